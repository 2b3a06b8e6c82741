//! Reads OpenMetrics text strictly (OpenMetrics 1.0 §3): what a scraper would refuse fails a test.

use std::collections::HashMap;

use serde_json::Value;

pub struct Metrics {
    samples: HashMap<String, f64>,
    /// Family and type.
    families: HashMap<String, String>,
}

impl Metrics {
    /// By name and labels, as they are written.
    #[track_caller]
    pub fn value(&self, series: &str) -> f64 {
        match self.samples.get(series) {
            Some(value) => *value,
            None => panic!("there is no {series}; there are {:#?}", {
                let mut names: Vec<_> = self.samples.keys().collect();
                names.sort();
                names
            }),
        }
    }

    /// Names of all series, without labels; those of a histogram without the ends that make three of it.
    pub fn names(&self) -> Vec<String> {
        let name = |(family, kind): (&String, &String)| match kind.as_str() {
            "histogram" => family.clone(),
            kind => format!("{family}{}", suffixes(kind)[0]),
        };
        let mut names: Vec<_> = self.families.iter().map(name).collect();
        names.sort();
        names
    }

    /// Whether there is a series of that name.
    pub fn has(&self, name: &str) -> bool {
        self.samples.keys().any(|series| series.split('{').next() == Some(name))
    }
}

/// Suffixes of the samples that a family of the type has.
fn suffixes(kind: &str) -> &'static [&'static str] {
    match kind {
        "counter" => &["_total"],
        "gauge" => &[""],
        "info" => &["_info"],
        "histogram" => &["_bucket", "_count", "_sum"],
        other => panic!("no such type: {other}"),
    }
}

pub fn parse(text: &str) -> Metrics {
    let body = text.strip_suffix("# EOF\n").expect("it ends with # EOF");
    let (mut samples, mut families) = (HashMap::new(), HashMap::new());
    let (mut family, mut kind, mut help) = (String::new(), String::new(), false);
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# ") {
            let mut words = rest.splitn(3, ' ');
            let [keyword, name, value] = [(); 3].map(|()| words.next().expect(line));
            match keyword {
                "TYPE" | "HELP" if name != family => {
                    let new = families.insert(name.to_owned(), String::new()).is_none();
                    assert!(new, "{name} comes twice");
                    (family, kind, help) = (name.to_owned(), String::new(), false);
                }
                _ => {}
            }
            match keyword {
                "TYPE" => {
                    kind = value.to_owned();
                    families.insert(name.to_owned(), kind.clone());
                }
                "HELP" => help = !value.trim().is_empty(),
                other => panic!("{other}: {line}"),
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').expect(line);
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').expect(line)),
            None => (series, ""),
        };
        assert!(help && !kind.is_empty(), "no HELP and TYPE before {line}");
        let fits = |suffix: &&str| name == format!("{family}{suffix}");
        assert!(suffixes(&kind).iter().any(fits), "{line} is no {kind} {family}");
        let valid = |c: char| c.is_ascii_alphanumeric() || c == '_';
        assert!(name.chars().all(valid), "{line}");
        for label in labels.split("\",").filter(|label| !label.is_empty()) {
            let (key, value) = label.split_once("=\"").expect(line);
            assert!(key.chars().all(valid) && !value.trim_end_matches('"').contains('"'), "{line}");
        }
        let value: f64 = value.parse().expect(line);
        assert!(kind != "counter" || value >= 0.0, "{line}");
        assert!(samples.insert(series.to_owned(), value).is_none(), "{series} comes twice");
    }
    for (series, count) in samples.iter().filter(|(series, _)| series.contains("_count")) {
        let whole = match series.split_once("_count{") {
            Some((name, labels)) => format!("{name}_bucket{{le=\"+Inf\",{labels}"),
            None => series.replace("_count", "_bucket{le=\"+Inf\"}"),
        };
        assert_eq!(samples.get(&whole), Some(count), "{whole}");
    }
    Metrics { samples, families }
}

/// The metrics that a dashboard's queries name.
pub fn names_in(dashboard: &Value, names: &mut Vec<String>) {
    match dashboard {
        Value::Object(fields) => {
            fields.iter().for_each(|(key, value)| match (key.as_str(), value) {
                ("expr", Value::String(query)) => {
                    let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
                    names.extend(words.filter(|w| w.starts_with("hermitage_")).map(str::to_owned));
                }
                (_, value) => names_in(value, names),
            })
        }
        Value::Array(values) => values.iter().for_each(|value| names_in(value, names)),
        _ => {}
    }
}

//! What a key may do: the options before its type in an `authorized_keys` line (sshd(8), "AUTHORIZED_KEYS FILE
//! FORMAT").
//!
//! Options that would widen what a key may do, or that nothing here can keep, are refused when the key is
//! added: a restriction that is ignored is worse than none.

use super::endpoint::Endpoint;
use super::source_pattern::SourcePattern;
use std::fmt;
use std::net::IpAddr;

/// Longest text of options, and most of them.
const MAX_TEXT: usize = 8 * 1024;
const MAX_OPTIONS: usize = 64;

/// What a login by a key, or by a certificate, is restricted to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyOptions {
    /// Runs in place of whatever is asked for.
    pub command: Option<String>,
    /// Where the client may be; everywhere if there is none.
    pub from: Vec<SourcePattern>,
    /// Seconds since 1970-01-01 UTC from which on the key opens nothing.
    pub expires: Option<i64>,
    pub pty: bool,
    pub agent_forwarding: bool,
    pub port_forwarding: bool,
    /// What may be connected to, and listened on. `None`: whatever there is; but not with an empty list.
    pub opens: Option<Vec<Endpoint>>,
    pub listens: Option<Vec<Endpoint>>,
    /// As they were given, without needless space; empty for none.
    text: String,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    #[error(
        "the options are too long ({0} bytes; {MAX_TEXT} are allowed, and {MAX_OPTIONS} options)"
    )]
    TooLong(usize),
    #[error("the options have a control character in them")]
    Control,
    #[error("the value of the option {0} is not in double quotes, or has no closing one")]
    Unclosed(String),
    #[error("\"{0}\" is no option known here")]
    Unknown(String),
    #[error("the option {0} can't be kept here, so the key is not taken: {1}")]
    Unsupported(String, &'static str),
    #[error("the option {0} needs a value in double quotes, as in {1}")]
    NoValue(&'static str, &'static str),
    #[error("the option {0} takes no value")]
    NeedlessValue(String),
    #[error("the option {0} is given twice")]
    Twice(&'static str),
    #[error(
        "from=\"…\": \"{0}\" is no address, network or pattern of addresses (names of hosts are not looked up)"
    )]
    Source(String),
    #[error("expiry-time=\"{0}\" is no time; YYYYMMDD or YYYYMMDDHHMM[SS], in UTC")]
    Expiry(String),
    #[error(
        "{0}=\"{1}\" is no place: {0}=\"localhost:5432\", or with * for the port; an IPv6 address in brackets"
    )]
    Endpoint(&'static str, String),
}

impl Default for KeyOptions {
    fn default() -> Self {
        Self {
            command: None,
            from: Vec::new(),
            expires: None,
            pty: true,
            agent_forwarding: true,
            port_forwarding: true,
            opens: None,
            listens: None,
            text: String::new(),
        }
    }
}

impl KeyOptions {
    /// May log in and run programs, and nothing else.
    pub fn restricted() -> Self {
        Self { pty: false, agent_forwarding: false, port_forwarding: false, ..Self::default() }
    }

    /// The options alone: `restrict,pty,command="borg serve"`. Empty is none.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let text = text.trim();
        if text.len() > MAX_TEXT {
            return Err(OptionError::TooLong(text.len()));
        }
        // They are shown on terminals, and written to logs.
        if text.chars().any(char::is_control) {
            return Err(OptionError::Control);
        }
        let mut options = Self { text: text.to_owned(), ..Self::default() };
        if text.is_empty() {
            return Ok(options);
        }
        let items = split(text)?;
        if items.len() > MAX_OPTIONS {
            return Err(OptionError::TooLong(text.len()));
        }
        for (name, value) in items {
            options.apply(&name, value)?;
        }
        Ok(options)
    }

    /// The same, ending at that time too; an error if they end already, or are long enough.
    pub fn until(&self, digits: &str) -> Result<Self, OptionError> {
        let comma = if self.text.is_empty() { "" } else { "," };
        Self::parse(&format!("{}{comma}expiry-time=\"{digits}\"", self.text))
    }

    fn apply(&mut self, name: &str, value: Option<String>) -> Result<(), OptionError> {
        let lower = name.to_ascii_lowercase();
        let set = |flag: &mut bool, to: bool| match value {
            None => {
                *flag = to;
                Ok(())
            }
            Some(_) => Err(OptionError::NeedlessValue(name.to_owned())),
        };
        match lower.as_str() {
            "restrict" => {
                (self.agent_forwarding, self.port_forwarding) = (false, false);
                set(&mut self.pty, false)
            }
            "pty" => set(&mut self.pty, true),
            "no-pty" => set(&mut self.pty, false),
            "agent-forwarding" => set(&mut self.agent_forwarding, true),
            "no-agent-forwarding" => set(&mut self.agent_forwarding, false),
            "port-forwarding" => set(&mut self.port_forwarding, true),
            "no-port-forwarding" => set(&mut self.port_forwarding, false),
            // Nobody has these here: X11 is not forwarded, and ~/.ssh/rc is not run.
            "no-x11-forwarding" | "no-user-rc" | "x11-forwarding" | "user-rc" => Ok(()),
            "command" => {
                let example = "command=\"git-shell\"";
                let value = value.filter(|value| !value.trim().is_empty());
                let value = value.ok_or(OptionError::NoValue("command", example))?;
                once(&mut self.command, value, "command")
            }
            "expiry-time" => {
                let example = "expiry-time=\"20270630\"";
                let value = value.ok_or(OptionError::NoValue("expiry-time", example))?;
                let expires = utc_of_digits(&value).ok_or(OptionError::Expiry(value))?;
                once(&mut self.expires, expires, "expiry-time")
            }
            "permitopen" => endpoint(&mut self.opens, "permitopen", value),
            "permitlisten" => endpoint(&mut self.listens, "permitlisten", value),
            "from" => {
                let example = "from=\"192.0.2.0/24,!192.0.2.7\"";
                let value = value.ok_or(OptionError::NoValue("from", example))?;
                if !self.from.is_empty() {
                    return Err(OptionError::Twice("from"));
                }
                self.from = sources(&value)?;
                Ok(())
            }
            _ => Err(unknown(name, &lower)),
        }
    }

    /// Whether a client at this address may use the key. As in OpenSSH, an exception outweighs all else.
    pub fn allows_source(&self, source: IpAddr) -> bool {
        let source = source.to_canonical();
        let matching = || self.from.iter().filter(|pattern| pattern.matches(source));
        self.from.is_empty()
            || (matching().next().is_some() && !matching().any(SourcePattern::is_exception))
    }

    pub fn expired(&self, now: i64) -> bool {
        self.expires.is_some_and(|expires| now >= expires)
    }

    /// Whether it may connect to that address in the machine.
    pub fn may_open(&self, host: &str, port: u16) -> bool {
        self.port_forwarding && permitted(&self.opens, host, port)
    }

    /// Whether it may listen there. As in OpenSSH, 0 for "any that is free" is a port like another.
    pub fn may_listen(&self, host: &str, port: u16) -> bool {
        self.port_forwarding && permitted(&self.listens, host, port)
    }

    /// Sockets in the file system are none of the places that `permitopen` and `permitlisten` list.
    pub fn may_open_sockets(&self) -> bool {
        self.port_forwarding && self.opens.is_none()
    }

    pub fn may_listen_on_sockets(&self) -> bool {
        self.port_forwarding && self.listens.is_none()
    }

    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }
}

impl fmt::Display for KeyOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn permitted(places: &Option<Vec<Endpoint>>, host: &str, port: u16) -> bool {
    places.as_ref().is_none_or(|places| places.iter().any(|place| place.matches(host, port)))
}

/// One more place; the option can be given again.
fn endpoint(
    places: &mut Option<Vec<Endpoint>>,
    name: &'static str,
    value: Option<String>,
) -> Result<(), OptionError> {
    let value = value.ok_or(OptionError::NoValue(name, "localhost:5432"))?;
    let bare_port = name == "permitlisten";
    let place = Endpoint::parse(&value, bare_port);
    let place = place.ok_or_else(|| OptionError::Endpoint(name, shown(&value)))?;
    places.get_or_insert_default().push(place);
    Ok(())
}

fn sources(list: &str) -> Result<Vec<SourcePattern>, OptionError> {
    let pattern = |text: &str| SourcePattern::parse(text).ok_or(OptionError::Source(shown(text)));
    list.split(',').map(pattern).collect()
}

/// Where the options end and the key begins: at the first blank that is not in quotes. A backslash means
/// something before a quote only.
pub(super) fn end_of_options(line: &str) -> usize {
    let mut quoted = false;
    let mut chars = line.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next_if(|(_, c)| *c == '"')),
            '"' => quoted = !quoted,
            ' ' | '\t' if !quoted => return at,
            _ => {}
        }
    }
    line.len()
}

/// Names and values, the quotes taken away. Only `\"` is an escape.
fn split(text: &str) -> Result<Vec<(String, Option<String>)>, OptionError> {
    let mut items = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find([',', '=']).unwrap_or(rest.len());
        let name = rest[..end].trim().to_owned();
        rest = &rest[end..];
        let mut value = None;
        if let Some(after) = rest.strip_prefix('=') {
            let Some(quoted) = after.strip_prefix('"') else {
                return Err(OptionError::Unclosed(name));
            };
            let mut out = String::new();
            let mut chars = quoted.char_indices().peekable();
            let close = loop {
                match chars.next() {
                    None => return Err(OptionError::Unclosed(name)),
                    Some((at, '"')) => break at,
                    Some((_, '\\')) if chars.next_if(|(_, c)| *c == '"').is_some() => out.push('"'),
                    Some((_, c)) => out.push(c),
                }
            };
            value = Some(out);
            rest = &quoted[close + 1..];
        }
        rest = match rest.strip_prefix(',') {
            Some(more) => more,
            None if rest.is_empty() => rest,
            None => return Err(OptionError::Unknown(shown(rest))),
        };
        items.push((name, value));
    }
    Ok(items)
}

fn once<T>(slot: &mut Option<T>, value: T, name: &'static str) -> Result<(), OptionError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(OptionError::Twice(name)),
    }
}

fn unknown(name: &str, lower: &str) -> OptionError {
    let why = match lower {
        "cert-authority" | "principals" => "authorities are named by ssh.user_ca_keys",
        "environment" => "a client's own SetEnv does that, for what ssh.accept_env allows",
        "verify-required" => "whether somebody entered a PIN is not looked at",
        "no-touch-required" => "it would widen what the key may do",
        "tunnel" => "there are no tunnel devices",
        _ => return OptionError::Unknown(shown(name)),
    };
    OptionError::Unsupported(shown(name), why)
}

fn shown(text: &str) -> String {
    text.chars().take(48).flat_map(char::escape_default).collect()
}

/// `YYYYMMDD`, `YYYYMMDDHHMM` or `YYYYMMDDHHMMSS`, with or without a `Z` for UTC, which is what is meant
/// in either case.
pub fn utc_of_digits(text: &str) -> Option<i64> {
    let digits = text.strip_suffix(['Z', 'z']).unwrap_or(text);
    if !matches!(digits.len(), 8 | 12 | 14) || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number = |from: usize, to: usize| digits.get(from..to).map_or(Some(0), |d| d.parse().ok());
    let (year, month, day): (i64, i64, i64) = (number(0, 4)?, number(4, 6)?, number(6, 8)?);
    let (hour, minute, second): (i64, i64, i64) =
        (number(8, 10)?, number(10, 12)?, number(12, 14)?);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if !(1..=length).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Years are counted from March, so that the leap day comes last.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days =
        365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (153 * m + 2) / 5 + day
            - 1
            - 719_468;
    Some(days * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
#[path = "key_options_tests.rs"]
mod tests;

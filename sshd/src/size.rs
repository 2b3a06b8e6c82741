//! Sizes as people write them: `10G`, `512MiB`, powers of 1024.

const UNITS: &[(&str, u32)] = &[("K", 10), ("M", 20), ("G", 30), ("T", 40)];

/// Bytes; without a unit the number is bytes.
pub fn parse(text: &str) -> Result<u64, String> {
    let upper = text.trim().to_ascii_uppercase();
    let plain = upper.strip_suffix("IB").or_else(|| upper.strip_suffix('B')).unwrap_or(&upper);
    let unit = UNITS.iter().find_map(|(unit, bits)| Some((plain.strip_suffix(unit)?, *bits)));
    let (digits, bits) = unit.unwrap_or((plain, 0));
    let number: u64 = digits
        .trim()
        .parse()
        .map_err(|_| format!("\"{text}\" is not a size; write for example 10G or 512M"))?;
    number.checked_mul(1 << bits).ok_or_else(|| format!("{text} is more than there is"))
}

/// `1.5 GiB`.
pub fn show(bytes: u64) -> String {
    match UNITS.iter().rev().find(|(_, bits)| bytes >= 1 << bits) {
        Some((unit, bits)) => {
            let number = format!("{:.1}", bytes as f64 / (1u64 << bits) as f64);
            format!("{} {unit}iB", number.strip_suffix(".0").unwrap_or(&number))
        }
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_written() {
        for (text, bytes) in [
            ("10G", 10 << 30),
            ("512MiB", 512 << 20),
            ("4096", 4096),
            ("1 t", 1 << 40),
            ("64kb", 65536),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for bad in ["", "G", "ten", "-1", "1.5G", "99999999999T", "1X"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_shown_short() {
        assert_eq!(show(0), "0 B");
        assert_eq!(show(10 << 30), "10 GiB");
        assert_eq!(show(1536 << 20), "1.5 GiB");
        assert_eq!(show(2048), "2 KiB");
    }
}

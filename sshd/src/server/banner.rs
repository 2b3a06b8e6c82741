//! What clients are shown before they log in (RFC 4252 §5.4), from a file that is read for each of them.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

/// Longest file, in bytes. It is sent to strangers.
const MOST: u64 = 8 * 1024;

/// The file's text as the protocol has it. Blocks.
pub fn read(path: &Path) -> io::Result<String> {
    // A pipe would be waited for.
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    let mut bytes = vec![];
    File::open(path)?.take(MOST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST {
        return Err(io::Error::other(format!("it has more than {MOST} bytes")));
    }
    let text = String::from_utf8(bytes).map_err(|_| io::Error::other("it is no UTF-8"))?;
    if let Some(c) = text.chars().find(|&c| c.is_control() && !"\n\r\t".contains(c)) {
        return Err(io::Error::other(format!(
            "it has the control character {}",
            c.escape_default()
        )));
    }
    Ok(text.lines().map(|line| format!("{line}\r\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_banner_has_lines_and_nothing_that_moves_the_cursor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("banner");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            read(&path).map_err(|error| error.to_string())
        };
        assert_eq!(read("Grüße\nfür alle".as_bytes()).unwrap(), "Grüße\r\nfür alle\r\n");
        assert_eq!(read(b"").unwrap(), "");
        assert!(read(b"a\x1b[2Jb").unwrap_err().contains("control character"));
        assert!(read(b"\xff").unwrap_err().contains("UTF-8"));
        assert!(read(&[b'x'; MOST as usize + 1]).unwrap_err().contains("8192"));
        assert!(super::read(dir.path()).is_err());
        assert!(super::read(&dir.path().join("none")).is_err());
    }
}

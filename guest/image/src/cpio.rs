//! Writes the archive the kernel unpacks as its first root: cpio in the "newc" layout, as described
//! in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Nothing in it varies
//! between builds: owner 0, time 0, inode numbers in order.

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

pub struct Writer<W> {
    out: W,
    inode: u32,
    /// Bytes written, for alignment to 4.
    written: u64,
}

struct Entry<'a> {
    name: &'a str,
    mode: u32,
    /// Device number of a node: major, minor.
    device: (u32, u32),
    data: &'a [u8],
}

impl<W: Write> Writer<W> {
    pub fn new(out: W) -> Self {
        Writer { out, inode: 0, written: 0 }
    }

    pub fn directory(&mut self, name: &str, permissions: u32) -> io::Result<()> {
        self.entry(&Entry { name, mode: DIRECTORY | permissions, device: (0, 0), data: &[] })
    }

    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) -> io::Result<()> {
        self.entry(&Entry { name, mode: REGULAR | permissions, device: (0, 0), data })
    }

    pub fn character_device(
        &mut self,
        name: &str,
        permissions: u32,
        device: (u32, u32),
    ) -> io::Result<()> {
        self.entry(&Entry { name, mode: CHARACTER | permissions, device, data: &[] })
    }

    /// Ends the archive and gives the output back.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry(&Entry { name: "TRAILER!!!", mode: 0, device: (0, 0), data: &[] })?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, entry: &Entry) -> io::Result<()> {
        let size = u32::try_from(entry.data.len())
            .map_err(|_| io::Error::other(format!("{} is over 4 GiB", entry.name)))?;
        self.inode += 1;
        let links = if entry.mode & DIRECTORY != 0 { 2 } else { 1 };
        let header = [
            self.inode,
            entry.mode,
            0, // uid
            0, // gid
            links,
            0, // mtime
            size,
            0, // device the archive was made on, major
            0, // and minor
            entry.device.0,
            entry.device.1,
            entry.name.len() as u32 + 1,
            0, // checksum, unused in newc
        ];
        self.put(b"070701")?;
        for field in header {
            self.put(format!("{field:08X}").as_bytes())?;
        }
        self.put(entry.name.as_bytes())?;
        self.put(&[0])?;
        self.align()?;
        self.put(entry.data)?;
        self.align()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn align(&mut self) -> io::Result<()> {
        let gap = (4 - self.written % 4) % 4;
        self.put(&[0; 3][..gap as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_small_archive() {
        let mut writer = Writer::new(Vec::new());
        writer.file("ab", 0o755, b"xyz12").unwrap();
        let bytes = writer.finish().unwrap();
        let header = b"070701\
            00000001000081ED000000000000000000000001000000000000000500000000000000000000000000000000\
            0000000300000000";
        assert_eq!(&bytes[..110], header);
        // 110 + "ab\0" = 113, padded to 116; 5 bytes of data, padded to 124
        assert_eq!(&bytes[110..124], b"ab\0\0\0\0xyz12\0\0\0");
        assert_eq!(&bytes[124..130], b"070701");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(11).any(|w| w == b"TRAILER!!!\0"));
    }

    /// The other implementation at hand: GNU cpio, where it is installed.
    #[test]
    fn gnu_cpio_reads_it() {
        use std::process::{Command, Stdio};
        let mut writer = Writer::new(Vec::new());
        writer.directory("dev", 0o755).unwrap();
        writer.character_device("dev/console", 0o600, (5, 1)).unwrap();
        writer.file("init", 0o755, &[7; 4097]).unwrap();
        let bytes = writer.finish().unwrap();
        let child = Command::new("cpio")
            .args(["-itv", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            eprintln!("skipped: cpio is not installed");
            return;
        };
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let listing = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<&str> = listing.lines().collect();
        assert_eq!(lines.len(), 3, "{listing}");
        assert!(lines[0].starts_with("drwxr-xr-x   2 root     root            0"), "{}", lines[0]);
        assert!(lines[1].starts_with("crw-------   1 root     root       5,   1"), "{}", lines[1]);
        assert!(lines[2].contains("4097") && lines[2].ends_with("init"), "{}", lines[2]);
    }
}

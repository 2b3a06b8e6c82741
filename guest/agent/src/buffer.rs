//! A bounded buffer between two descriptors that do not block.

use std::io::{self, Read, Write};

/// What is read at once and waits at most, per direction of a terminal. A pty holds a few KiB itself.
pub const CAPACITY: usize = 16 * 1024;

pub struct Buffer {
    /// Allocated by the first use: terminals that were never opened cost nothing.
    bytes: Vec<u8>,
    start: usize,
}

/// How a transfer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// Some bytes moved, how many.
    Moved(usize),
    /// None could move now.
    Blocked,
    /// End of file (reading), or the other side is gone.
    Ended,
}

impl Buffer {
    pub fn new() -> Self {
        Buffer { bytes: Vec::new(), start: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    /// Reads once if the buffer is empty: it is either being filled or being emptied.
    pub fn fill(&mut self, mut source: impl Read) -> io::Result<Transfer> {
        if !self.is_empty() {
            return Ok(Transfer::Blocked);
        }
        self.bytes.resize(CAPACITY, 0);
        self.start = 0;
        let result = transferred(source.read(&mut self.bytes));
        self.bytes.truncate(match result {
            Ok(Transfer::Moved(count)) => count,
            _ => 0,
        });
        result
    }

    /// Writes what it holds until that is all or the sink blocks.
    pub fn drain(&mut self, mut sink: impl Write) -> io::Result<Transfer> {
        let mut moved = 0;
        while !self.is_empty() {
            match transferred(sink.write(&self.bytes[self.start..]))? {
                Transfer::Moved(count) => {
                    self.start += count;
                    moved += count;
                }
                Transfer::Blocked if moved == 0 => return Ok(Transfer::Blocked),
                Transfer::Blocked => break,
                Transfer::Ended => return Ok(Transfer::Ended),
            }
        }
        Ok(Transfer::Moved(moved))
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.start = 0;
    }
}

fn transferred(result: io::Result<usize>) -> io::Result<Transfer> {
    match result {
        Ok(0) => Ok(Transfer::Ended),
        Ok(count) => Ok(Transfer::Moved(count)),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Transfer::Blocked),
            _ => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes `room` bytes, then blocks.
    struct Sink {
        taken: Vec<u8>,
        room: usize,
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(self.room).min(5);
            if count == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.room -= count;
            self.taken.extend_from_slice(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_byte_passes_once_and_in_order() {
        let data: Vec<u8> = (0..40_000u32).map(|n| (n % 251) as u8).collect();
        let mut source = data.as_slice();
        let mut sink = Sink { taken: Vec::new(), room: 0 };
        let mut buffer = Buffer::new();
        loop {
            if buffer.is_empty() && buffer.fill(&mut source).unwrap() == Transfer::Ended {
                break;
            }
            sink.room += 7;
            assert!(matches!(buffer.drain(&mut sink).unwrap(), Transfer::Moved(n) if n > 0));
        }
        assert_eq!(sink.taken, data);
    }

    #[test]
    fn a_full_buffer_reads_no_more() {
        let mut buffer = Buffer::new();
        let mut source: &[u8] = &[1; 2 * CAPACITY];
        assert_eq!(buffer.fill(&mut source).unwrap(), Transfer::Moved(CAPACITY));
        assert_eq!(buffer.fill(&mut source).unwrap(), Transfer::Blocked);
        assert_eq!(source.len(), CAPACITY);
        assert_eq!(buffer.drain(Sink { taken: Vec::new(), room: 0 }).unwrap(), Transfer::Blocked);
        assert!(!buffer.is_empty());
    }
}

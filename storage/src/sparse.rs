//! Files with holes: copying their data only, and a digest that doesn't mind where the holes are.
//!
//! The digest of a file is the same whether a page of zeroes is stored or a hole, so it survives a
//! copy that makes or fills holes; it depends on the file's length and every byte. It is fast because it
//! reads nothing where there is nothing, uses all processors, and is XXH3: it is there to find damage, not
//! forgery (who can write the file can write its digest beside it). `docs/formats/base.md` defines it.

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use twox_hash::XxHash3_128;

const PAGE: usize = 4096;
/// What is hashed at once by one thread.
const SEGMENT: usize = 4 << 20;
/// One bit for each of its pages.
const BITMAP: usize = SEGMENT / PAGE / 8;
const MAX_THREADS: usize = 8;

/// A digest of a sparse file; also its text, 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest([u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The part of `start..end` that begins with the first byte of data, up to where the data or the part
/// ends. `None`: nothing but a hole.
pub fn next_data(file: &File, start: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
    let data = match seek(file, SeekFrom::Data(start)) {
        Ok(data) if data < end => data,
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let hole = seek(file, SeekFrom::Hole(data))?.min(end);
    Ok(Some((data, hole)))
}

/// How much of a file is data, in bytes: an upper bound of what is not zero.
pub fn data_bytes(file: &File) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let (mut at, mut total) = (0, 0);
    while let Some((data, hole)) = next_data(file, at, length)? {
        total += hole - data;
        at = hole;
    }
    Ok(total)
}

/// Makes `to`, an empty file, a copy of `from` that shares its blocks, at once. False: the file system can't.
pub fn share(from: &File, to: &File) -> io::Result<bool> {
    match ioctl_ficlone(to, from) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => {
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// Makes `to`, an empty file, a copy of `from`: sharing its blocks where the file system can, else by
/// copying its data and leaving its holes.
pub fn copy(from: &File, to: &File) -> io::Result<()> {
    if share(from, to)? {
        return Ok(());
    }
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut buffer = vec![0; 256 * 1024];
    let mut at = 0;
    while let Some((data, hole)) = next_data(from, at, length)? {
        at = data;
        while at < hole {
            let part = &mut buffer[..((hole - at) as usize).min(256 * 1024)];
            from.read_exact_at(part, at)?;
            to.write_all_at(part, at)?;
            at += part.len() as u64;
        }
    }
    Ok(())
}

/// The digest of a whole file. Fails with `UnexpectedEof` if the file shrinks meanwhile.
pub fn digest(file: &File) -> io::Result<Digest> {
    let length = file.metadata()?.len();
    let next = AtomicU64::new(0);
    let threads = thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_THREADS);
    let mut segments = thread::scope(|scope| {
        let workers: Vec<_> =
            (0..threads).map(|_| scope.spawn(|| digest_segments(file, length, &next))).collect();
        let mut all = Vec::new();
        for worker in workers {
            let part = worker.join().map_err(|_| io::Error::other("a hashing thread died"))?;
            all.extend(part?);
        }
        Ok::<_, io::Error>(all)
    })?;
    segments.sort_unstable_by_key(|(index, _)| *index);
    let mut whole = blake3::Hasher::new_derive_key("hermitage sparse file 1");
    whole.update(&length.to_le_bytes());
    for (index, digest) in segments {
        whole.update(&index.to_le_bytes());
        whole.update(&digest.to_le_bytes());
    }
    Ok(Digest(*whole.finalize().as_bytes()))
}

/// Takes segments until none is left. Returns those that hold anything but zeroes.
fn digest_segments(file: &File, length: u64, next: &AtomicU64) -> io::Result<Vec<(u64, u128)>> {
    let mut buffer = vec![0; SEGMENT + BITMAP];
    let mut found = Vec::new();
    loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        let start = index * SEGMENT as u64;
        if start >= length {
            return Ok(found);
        }
        let end = length.min(start + SEGMENT as u64);
        if read_segment(file, start, end, &mut buffer[..SEGMENT])? {
            found.extend(digest_segment(&mut buffer).map(|digest| (index, digest)));
        }
    }
}

/// Fills the buffer with a segment, zeroes for its holes and past its end. False: it is all hole.
fn read_segment(file: &File, start: u64, end: u64, buffer: &mut [u8]) -> io::Result<bool> {
    let mut at = start;
    let mut filled = 0;
    while let Some((data, hole)) = next_data(file, at, end)? {
        let (from, to) = ((data - start) as usize, (hole - start) as usize);
        buffer[filled..from].fill(0);
        file.read_exact_at(&mut buffer[from..to], data)?;
        filled = to;
        at = hole;
    }
    buffer[filled..].fill(0);
    Ok(filled > 0)
}

/// The digest of the pages that are not all zero, then one bit for each page: was it one of them?
/// `None` if there is none. `buffer` is a segment and room for the bits; pages and bits are moved together,
/// so that they are hashed in one sweep.
fn digest_segment(buffer: &mut [u8]) -> Option<u128> {
    const ZERO: [u8; PAGE] = [0; PAGE];
    let mut present = [0u8; BITMAP];
    let mut kept = 0;
    for page in 0..SEGMENT / PAGE {
        let range = page * PAGE..(page + 1) * PAGE;
        if buffer[range.clone()] == ZERO {
            continue;
        }
        present[page / 8] |= 1 << (page % 8);
        if range.start != kept {
            buffer.copy_within(range, kept);
        }
        kept += PAGE;
    }
    if kept == 0 {
        return None;
    }
    buffer[kept..kept + BITMAP].copy_from_slice(&present);
    Some(XxHash3_128::oneshot(&buffer[..kept + BITMAP]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    fn file(length: u64, pieces: &[(u64, Vec<u8>)]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        for (offset, bytes) in pieces {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file
    }

    #[test]
    fn holes_and_zeroes_are_the_same() {
        let data = (5 << 20, vec![9; 10_000]);
        let holes = file(9 << 20, std::slice::from_ref(&data));
        let filled = file(9 << 20, &[(0, vec![0; 9 << 20]), data]);
        assert!(holes.metadata().unwrap().blocks() < filled.metadata().unwrap().blocks());
        assert_eq!(digest(&holes).unwrap(), digest(&filled).unwrap());
    }

    #[test]
    fn length_and_place_count() {
        let one = |length, offset| digest(&file(length, &[(offset, vec![1])])).unwrap();
        let all = [
            one(8192, 0),
            one(8193, 0),
            one(8192, 1),
            one(8192, 4096),
            one(9 << 20, 4 << 20),
            one(9 << 20, 8 << 20),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b), "{all:?}");
        }
        assert_ne!(digest(&file(0, &[])).unwrap(), digest(&file(1, &[])).unwrap());
    }

    #[test]
    fn a_copy_is_equal_and_as_sparse() {
        let from = file(1 << 30, &[(0, vec![1; 5000]), (700 << 20, vec![2; 1 << 20])]);
        let to = tempfile::tempfile().unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(to.metadata().unwrap().len(), 1 << 30);
        assert!(to.metadata().unwrap().blocks() * 512 < 4 << 20);
        assert_eq!(digest(&from).unwrap(), digest(&to).unwrap());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// A digest changes with any byte, and is itself again when the byte is.
        #[test]
        fn every_byte_counts(
            length in 1u64..6_000_000,
            pieces in proptest::collection::vec((0u64..6_000_000, 1usize..9000, any::<u8>()), 0..6),
            flip in any::<(u64, u8)>(),
        ) {
            let pieces: Vec<_> = pieces
                .into_iter()
                .filter(|(offset, size, _)| offset + *size as u64 <= length)
                .map(|(offset, size, byte)| (offset, vec![byte; size]))
                .collect();
            let file = file(length, &pieces);
            let before = digest(&file).unwrap();
            let (offset, mask) = (flip.0 % length, flip.1 | 1);
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset).unwrap();
            file.write_all_at(&[byte[0] ^ mask], offset).unwrap();
            prop_assert_ne!(digest(&file).unwrap(), before);
            file.write_all_at(&byte, offset).unwrap();
            prop_assert_eq!(digest(&file).unwrap(), before);
        }
    }
}

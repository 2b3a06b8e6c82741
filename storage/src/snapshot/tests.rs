use super::*;
use crate::base::BaseId;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use uuid::Uuid;

const RAM_PAGES: u64 = 4096;

fn description() -> Description {
    Description {
        base: BaseId::parse("00112233445566778899aabbccddeeff").unwrap(),
        account: Uuid::from_u128(7),
        disk_tag: *b"sixteen bytes of",
        created: -5,
        ram: RAM_PAGES * PAGE as u64,
        vcpus: 2,
        state_version: 9,
    }
}

/// Pages by number; a page is filled with its byte.
type Pages = BTreeMap<u64, u8>;

fn write(pages: &Pages, state: &[u8]) -> (File, Header) {
    let file = tempfile::tempfile().unwrap();
    let content: Vec<_> = pages.values().map(|byte| [[*byte; PAGE]]).collect();
    let mut writer = Writer::new(&file).unwrap();
    for (&page, data) in pages.keys().zip(&content) {
        match data[0][0] {
            0 => writer.zero(page).unwrap(),
            _ => writer.data(page, data).unwrap(),
        }
    }
    let header = writer.finish(description(), state).unwrap();
    (file, header)
}

fn read(snapshot: &Snapshot) -> Pages {
    let mut pages = Pages::new();
    for run in &snapshot.runs {
        for n in 0..run.pages {
            let mut data = [0; PAGE];
            if let Content::Data { at } = run.content {
                snapshot.file.read_exact_at(&mut data, at + n * PAGE as u64).unwrap();
                assert_ne!(data[0], 0);
            }
            assert!(data.iter().all(|byte| *byte == data[0]));
            pages.insert(run.page + n, data[0]);
        }
    }
    pages
}

/// Some of everything: runs of both kinds, neighbours, single pages.
fn example() -> Pages {
    let mut pages: Pages = (10..90).map(|page| (page, page as u8)).collect();
    pages.extend((90..95).map(|page| (page, 0)));
    pages.extend([(0, 1), (2, 2), (4, 0), (5, 3), (RAM_PAGES - 1, 4)]);
    pages
}

fn copy(file: &File) -> File {
    let to = tempfile::tempfile().unwrap();
    crate::sparse::copy(file, &to).unwrap();
    to
}

#[test]
fn a_snapshot_is_read_as_written() {
    let pages = example();
    let (file, header) = write(&pages, b"state");
    assert_eq!(header.file_bytes(), file.metadata().unwrap().len());
    assert_eq!((header.data_pages, header.zero_pages, header.runs), (84, 6, 7));
    assert_eq!(read_header(&file).unwrap(), header);
    assert_eq!(verify(&file).unwrap(), header);
    let snapshot = Snapshot::open(file).unwrap();
    assert_eq!(snapshot.header.description, description());
    assert_eq!(snapshot.state, b"state");
    assert_eq!(read(&snapshot), pages);
}

#[test]
fn an_empty_difference_is_a_snapshot_too() {
    let (file, header) = write(&Pages::new(), &[]);
    assert_eq!(header.file_bytes(), HEADER_BYTES as u64);
    assert_eq!(Snapshot::open(file).unwrap().runs, []);
}

#[test]
fn pages_that_are_written_as_they_come_are_those_that_are_written_at_the_end() {
    // More pieces than fit in one write, and neighbours given at once.
    let many = RAM_PAGES - 1;
    let pages: Pages = (0..many).map(|page| (page, (page % 255) as u8 + 1)).collect();
    let content: Vec<_> = pages.values().map(|byte| [*byte; PAGE]).collect();
    let file = tempfile::tempfile().unwrap();
    let mut writer = Writer::new(&file).unwrap();
    for (first, three) in (0..).step_by(3).zip(content.chunks(3)) {
        writer.data(first, three).unwrap();
    }
    let header = writer.finish(description(), b"state").unwrap();
    assert_eq!((header.data_pages, header.runs), (many, 1));
    assert_eq!(header, write(&pages, b"state").1);
    assert_eq!(read(&Snapshot::open(file).unwrap()), pages);
}

#[test]
fn every_bit_counts() {
    let (file, header) = write(&example(), &[5; 300]);
    let length = header.file_bytes();
    // All of header, index and state; of the data a byte here and there.
    let all = (0..HEADER_BYTES as u64).chain(header.index_at()..length);
    let some = (HEADER_BYTES as u64..header.index_at()).step_by(4999);
    for (n, at) in all.chain(some).enumerate() {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << (n % 8)], at).unwrap();
        assert!(verify(&file).is_err(), "byte {at} of {length}");
        file.write_all_at(&byte, at).unwrap();
    }
    verify(&file).unwrap();
}

#[test]
fn every_other_length_is_refused() {
    let (file, header) = write(&example(), &[5; 300]);
    let length = header.file_bytes();
    let shorter = (0..length).rev().step_by(1777).chain([length - 1, 4096, 4095, 1, 0]);
    for other in shorter.chain([length + 1, length + 4096, 1 << 40]) {
        let file = copy(&file);
        file.set_len(other).unwrap();
        let error = verify(&file).unwrap_err();
        assert!(matches!(error, SnapshotError::Length { .. }), "{other}: {error}");
    }
}

#[test]
fn what_is_no_snapshot_of_ours_is_named() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(10_000).unwrap();
    assert!(matches!(verify(&file), Err(SnapshotError::NotASnapshot)));
    let (file, _) = write(&example(), &[]);
    file.write_all_at(&[2], 8).unwrap();
    assert!(matches!(verify(&file), Err(SnapshotError::Version(2))));
    assert!(matches!(verify(&File::open("/dev/zero").unwrap()), Err(SnapshotError::NotASnapshot)));
    assert!(matches!(verify(&File::open("/").unwrap()), Err(SnapshotError::NotASnapshot)));
}

#[test]
fn a_writer_keeps_to_order_and_bounds() {
    let file = tempfile::tempfile().unwrap();
    let mut writer = Writer::new(&file).unwrap();
    writer.zero(5).unwrap();
    assert!(matches!(writer.zero(5), Err(SnapshotError::Order { page: 5, last: 5 })));
    assert!(matches!(writer.data(4, &[[1; PAGE]]), Err(SnapshotError::Order { .. })));
    let long = vec![0; MAX_STATE as usize + 1];
    let writer = Writer::new(&file).unwrap();
    assert!(matches!(
        writer.finish(description(), &long),
        Err(SnapshotError::TooMuch { limit: MAX_STATE, .. })
    ));
    let (file, _) = write(&example(), &[]);
    assert!(Writer::new(&file).is_err(), "a file with something in it");
    let file = tempfile::tempfile().unwrap();
    let mut writer = Writer::new(&file).unwrap();
    writer.zero(RAM_PAGES).unwrap();
    writer.finish(description(), &[]).unwrap();
    let error = verify(&file).unwrap_err();
    assert!(matches!(error, SnapshotError::Run { index: 0, .. }), "{error}");
}

/// What a hostile writer could do: an index with right sums and wrong runs.
#[test]
fn a_wrong_index_with_right_sums_is_refused() {
    const fn record(page: u64, pages: u32, kind: u32) -> (u64, u32, u32) {
        (page, pages, kind)
    }
    let refused = |records: &[(u64, u32, u32)], data_pages: u64, zero_pages: u64| {
        let mut raw = Vec::new();
        for (page, pages, kind) in records {
            raw.extend_from_slice(&page.to_le_bytes());
            raw.extend_from_slice(&pages.to_le_bytes());
            raw.extend_from_slice(&kind.to_le_bytes());
        }
        let expected = index::Expected { ram_pages: RAM_PAGES, data_pages, zero_pages };
        index::decode(&raw, &expected).is_err()
    };
    assert!(!refused(&[record(0, 2, 0), record(2, 1, 1), record(5, 1, 1)], 2, 2));
    assert!(refused(&[record(0, 2, 0), record(1, 1, 1)], 1, 2), "overlap");
    assert!(refused(&[record(5, 1, 0), record(1, 1, 1)], 1, 1), "order");
    assert!(refused(&[record(0, 1, 0), record(1, 1, 0)], 0, 2), "not merged");
    assert!(refused(&[record(0, 0, 0)], 0, 0), "empty");
    assert!(refused(&[record(0, 1, 2)], 1, 0), "kind");
    assert!(refused(&[record(RAM_PAGES - 1, 2, 0)], 0, 2), "end of RAM");
    assert!(refused(&[record(u64::MAX, 2, 0)], 0, 2), "wraps");
    assert!(refused(&[record(0, 1, 1)], 2, 0), "less data than said");
    assert!(refused(&[record(0, 3, 1)], 2, 0), "more data than there is");
}

#[test]
fn a_header_out_of_bounds_with_a_right_sum_is_refused() {
    let (_, good) = write(&example(), &[1; 10]);
    let altered = |alter: fn(&mut Header)| {
        let mut header = good.clone();
        alter(&mut header);
        Header::decode(&header.encode())
    };
    assert_eq!(altered(|_| ()).unwrap(), good);
    assert!(altered(|h| h.description.ram = 0).is_err());
    assert!(altered(|h| h.description.ram = 4097).is_err());
    assert!(altered(|h| h.description.ram = u64::MAX - 4095).is_err());
    assert!(altered(|h| h.description.vcpus = 0).is_err());
    assert!(altered(|h| h.data_pages = RAM_PAGES + 1).is_err());
    assert!(altered(|h| h.data_pages = u64::MAX / 4096).is_err());
    assert!(altered(|h| h.zero_pages = u64::MAX).is_err());
    assert!(altered(|h| h.runs = u64::MAX).is_err());
    assert!(altered(|h| h.state = MAX_STATE + 1).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_set_of_pages_survives(
        pages in proptest::collection::btree_map(0..RAM_PAGES, 0u8..4, 0..200),
        state in proptest::collection::vec(any::<u8>(), 0..2000),
    ) {
        let (file, header) = write(&pages, &state);
        let snapshot = Snapshot::open(file).unwrap();
        prop_assert_eq!(&snapshot.header, &header);
        prop_assert_eq!(read(&snapshot), pages);
        prop_assert_eq!(snapshot.state, state);
    }

    /// Anything at all in the place of an index: refused, or within bounds.
    #[test]
    fn no_index_leads_out_of_bounds(
        records in proptest::collection::vec((0u64..RAM_PAGES + 9, 0u32..40, 0u32..3), 0..30),
        sorted in any::<bool>(),
        data_pages in 0u64..200,
        zero_pages in 0u64..200,
    ) {
        let mut records = records;
        if sorted {
            records.sort_unstable();
        }
        let raw: Vec<u8> = records
            .iter()
            .flat_map(|(page, pages, kind)| {
                [&page.to_le_bytes()[..], &pages.to_le_bytes(), &kind.to_le_bytes()].concat()
            })
            .collect();
        let expected = index::Expected { ram_pages: RAM_PAGES, data_pages, zero_pages };
        if let Ok(runs) = index::decode(&raw, &expected) {
            let mut end = 0;
            let data_end = (1 + data_pages) * PAGE as u64;
            for run in runs {
                prop_assert!(run.page >= end && run.end() <= RAM_PAGES);
                end = run.end();
                if let Content::Data { at } = run.content {
                    prop_assert!(at + run.pages * PAGE as u64 <= data_end);
                }
            }
        }
    }

    #[test]
    fn no_bytes_crash_the_reader(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        at in 0u64..9000,
    ) {
        let (file, _) = write(&example(), &[1; 100]);
        file.write_all_at(&bytes, at).unwrap();
        let _ = Snapshot::open(file);
    }
}

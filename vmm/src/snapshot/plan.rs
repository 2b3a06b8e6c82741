//! Which pages a save has to look at, and how closely.

use std::ops::Range;

use hermitage_storage::snapshot::{Content, Run};

/// What is known of some pages before they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// The machine wrote them: they may be anything, also what the base has.
    Nothing,
    /// They differ from the base's, as when the machine was resumed, and have data.
    Differ,
    /// They are zero and the base's are not, as when the machine was resumed.
    Zero,
}

/// Neighbouring pages of which the same is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub pages: Range<u64>,
    pub known: Known,
}

/// The pages that can differ from the base's: those written since the machine was made, and those that
/// it was resumed with. `written` and `former` are in order and without overlaps, and so is the result.
pub fn plan(written: &[Range<u64>], former: &[Run]) -> Vec<Piece> {
    let mut pieces = Vec::with_capacity(written.len() + former.len());
    let mut former = former.iter().peekable();
    // Where in the present run the part begins that is not dealt with.
    let mut from = 0;
    for range in written {
        while let Some(run) = former.peek().filter(|run| run.page < range.start) {
            let start = run.page.max(from);
            let end = run.end().min(range.start);
            if start < end {
                pieces.push(Piece { pages: start..end, known: known(run) });
            }
            if run.end() > range.end {
                break;
            }
            former.next();
        }
        // What was written over is no longer what it was.
        while former.peek().is_some_and(|run| run.end() <= range.end) {
            former.next();
        }
        pieces.push(Piece { pages: range.clone(), known: Known::Nothing });
        from = range.end;
    }
    for run in former {
        let start = run.page.max(from);
        if start < run.end() {
            pieces.push(Piece { pages: start..run.end(), known: known(run) });
        }
    }
    pieces
}

fn known(run: &Run) -> Known {
    match run.content {
        Content::Zero => Known::Zero,
        Content::Data { .. } => Known::Differ,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Page by page: what was written is looked at, what came with the machine is kept.
        #[test]
        fn every_page_is_in_once_and_as_what_it_is(
            written in proptest::collection::btree_set(0u64..60, 0..40),
            former in proptest::collection::btree_map(0u64..60, any::<bool>(), 0..40),
        ) {
            let mut ranges: Vec<Range<u64>> = Vec::new();
            for &page in &written {
                match ranges.last_mut() {
                    Some(last) if last.end == page => last.end += 1,
                    _ => ranges.push(page..page + 1),
                }
            }
            let mut runs: Vec<Run> = Vec::new();
            for (&page, &zero) in &former {
                let content = if zero { Content::Zero } else { Content::Data { at: 0 } };
                match runs.last_mut() {
                    Some(last) if last.end() == page && last.content == content => last.pages += 1,
                    _ => runs.push(Run { page, pages: 1, content }),
                }
            }
            let mut expected = BTreeMap::new();
            expected.extend(former.iter().map(|(&page, &zero)| {
                (page, if zero { Known::Zero } else { Known::Differ })
            }));
            expected.extend(written.iter().map(|&page| (page, Known::Nothing)));

            let mut found = BTreeMap::new();
            let mut end = 0;
            for piece in plan(&ranges, &runs) {
                prop_assert!(piece.pages.start >= end && !piece.pages.is_empty());
                end = piece.pages.end;
                found.extend(piece.pages.map(|page| (page, piece.known)));
            }
            prop_assert_eq!(found, expected);
        }
    }
}

//! The account's user under another name: her disk comes from an account that had another one
//! (docs/formats/archive.md).
//!
//! As `usermod -l` (usermod(8)): the login name changes, wherever it stands. Her home directory stays where it is, and so
//! does her group: what names the old path in her files goes on to work.

use std::path::Path;

use anyhow::Result;

use super::{fields, read, replace};

/// Which field of a file's lines has what kind of names. passwd is last: its line says that the rest is done.
const FILES: [(&str, Names); 6] = [
    ("group", Names::Members(&[3])),
    ("gshadow", Names::Members(&[2, 3])),
    ("shadow", Names::First),
    ("subuid", Names::First),
    ("subgid", Names::First),
    ("passwd", Names::First),
];

#[derive(Clone, Copy)]
enum Names {
    /// The line's own name, as in passwd(5), shadow(5), subuid(5).
    First,
    /// Lists with commas, as in group(5), gshadow(5).
    Members(&'static [usize]),
}

/// Can be done again: what has the new name already stays so.
pub fn rename(etc: &Path, old: &str, new: &str) -> Result<()> {
    let mut files = vec![];
    for (file, names) in FILES {
        let content = read(&etc.join(file))?;
        files.push((file, renamed(&content, names, old.as_bytes(), new.as_bytes())));
    }
    replace(etc, &files)
}

fn renamed(file: &[u8], names: Names, old: &[u8], new: &[u8]) -> Vec<u8> {
    let lines = file.split(|byte| *byte == b'\n').map(|line| {
        let mut fields: Vec<Vec<u8>> = fields(line).into_iter().map(<[u8]>::to_vec).collect();
        match names {
            Names::First if fields[0] == old => fields[0] = new.to_vec(),
            Names::First => {}
            Names::Members(lists) => {
                for list in lists {
                    let Some(field) = fields.get_mut(*list) else { continue };
                    let members = field.split(|byte| *byte == b',');
                    let members = members.map(|one| if one == old { new } else { one });
                    *field = members.collect::<Vec<_>>().join(&b',');
                }
            }
        }
        fields.join(&b':')
    });
    lines.collect::<Vec<_>>().join(&b'\n')
}

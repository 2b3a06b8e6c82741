//! Messages on the kernel's log (`/dev/kmsg`), hence on ttyS0: before a fork is attached there is
//! nobody else to tell. The kernel prefixes time; the level decides what reaches the console.

use std::fmt::Arguments;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;

static KMSG: OnceLock<File> = OnceLock::new();

/// Opens the log as soon as /dev is there. Before, and where it can't be opened, messages go to
/// standard error, which the kernel made the console.
pub fn open() {
    if let Ok(file) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = KMSG.set(file);
    }
}

pub fn info(message: Arguments) {
    write(6, message);
}

pub fn warn(message: Arguments) {
    write(4, message);
}

pub fn error(message: Arguments) {
    write(3, message);
}

fn write(level: u8, message: Arguments) {
    let mut text = format!("<{level}>hermitage-agent: {message}");
    // printk's record limit is just under 1 KiB.
    let mut end = text.len().min(900);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    // A record without a line's end waits for its continuation and isn't shown until the next.
    let text = text.replace('\n', " ") + "\n";
    match KMSG.get() {
        Some(mut file) => drop(file.write_all(text.as_bytes())),
        None => eprint!("{text}"),
    }
}

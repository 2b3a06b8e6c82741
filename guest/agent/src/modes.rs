//! Terminal modes as SSH encodes them (RFC 4254 §8; IUTF8 from RFC 8160), set on a Linux tty.

use nix::sys::termios::{
    BaudRate, ControlFlags, InputFlags, LocalFlags, OutputFlags, SpecialCharacterIndices, Termios,
};

/// Applies the client's modes; what Linux has no word for (VDSUSP, VSTATUS) or nobody knows is
/// passed over, as §8 says.
pub fn apply(termios: &mut Termios, modes: &[(u8, u32)]) {
    for &(opcode, value) in modes {
        match mode(opcode) {
            Some(Mode::Character(index)) => {
                // 255 stands for "disabled", which is _POSIX_VDISABLE here.
                let value = if value == 255 { 0 } else { value as u8 };
                termios.control_chars[index as usize] = value;
            }
            Some(Mode::Input(flag)) => termios.input_flags.set(flag, value != 0),
            Some(Mode::Output(flag)) => termios.output_flags.set(flag, value != 0),
            Some(Mode::Local(flag)) => termios.local_flags.set(flag, value != 0),
            Some(Mode::Control(flag)) => termios.control_flags.set(flag, value != 0),
            Some(Mode::Size(size)) if value != 0 => {
                termios.control_flags.remove(ControlFlags::CSIZE);
                termios.control_flags.insert(size);
            }
            Some(Mode::Speed) => {
                // Not by cfsetospeed(3): a static program can't be linked against its symbol
                // version. The kernel takes the speed from these flags, for both directions.
                if let Some(speed) = speed(value) {
                    termios.control_flags.remove(ControlFlags::CBAUD);
                    termios.control_flags.insert(ControlFlags::from_bits_retain(speed as u32));
                }
            }
            Some(Mode::Size(_)) | None => {}
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Character(SpecialCharacterIndices),
    Input(InputFlags),
    Output(OutputFlags),
    Local(LocalFlags),
    Control(ControlFlags),
    Size(ControlFlags),
    Speed,
}

/// The table of RFC 4254 §8.
fn mode(opcode: u8) -> Option<Mode> {
    use Mode::{Character, Control, Input, Local, Output, Size};
    use SpecialCharacterIndices as Char;
    Some(match opcode {
        1 => Character(Char::VINTR),
        2 => Character(Char::VQUIT),
        3 => Character(Char::VERASE),
        4 => Character(Char::VKILL),
        5 => Character(Char::VEOF),
        6 => Character(Char::VEOL),
        7 => Character(Char::VEOL2),
        8 => Character(Char::VSTART),
        9 => Character(Char::VSTOP),
        10 => Character(Char::VSUSP),
        // 11: VDSUSP
        12 => Character(Char::VREPRINT),
        13 => Character(Char::VWERASE),
        14 => Character(Char::VLNEXT),
        // 15: VFLUSH
        16 => Character(Char::VSWTC),
        // 17: VSTATUS
        18 => Character(Char::VDISCARD),
        30 => Input(InputFlags::IGNPAR),
        31 => Input(InputFlags::PARMRK),
        32 => Input(InputFlags::INPCK),
        33 => Input(InputFlags::ISTRIP),
        34 => Input(InputFlags::INLCR),
        35 => Input(InputFlags::IGNCR),
        36 => Input(InputFlags::ICRNL),
        37 => Input(InputFlags::from_bits_retain(libc::IUCLC)),
        38 => Input(InputFlags::IXON),
        39 => Input(InputFlags::IXANY),
        40 => Input(InputFlags::IXOFF),
        41 => Input(InputFlags::IMAXBEL),
        42 => Input(InputFlags::IUTF8),
        50 => Local(LocalFlags::ISIG),
        51 => Local(LocalFlags::ICANON),
        52 => Local(LocalFlags::from_bits_retain(libc::XCASE)),
        53 => Local(LocalFlags::ECHO),
        54 => Local(LocalFlags::ECHOE),
        55 => Local(LocalFlags::ECHOK),
        56 => Local(LocalFlags::ECHONL),
        57 => Local(LocalFlags::NOFLSH),
        58 => Local(LocalFlags::TOSTOP),
        59 => Local(LocalFlags::IEXTEN),
        60 => Local(LocalFlags::ECHOCTL),
        61 => Local(LocalFlags::ECHOKE),
        62 => Local(LocalFlags::PENDIN),
        70 => Output(OutputFlags::OPOST),
        71 => Output(OutputFlags::OLCUC),
        72 => Output(OutputFlags::ONLCR),
        73 => Output(OutputFlags::OCRNL),
        74 => Output(OutputFlags::ONOCR),
        75 => Output(OutputFlags::ONLRET),
        90 => Size(ControlFlags::CS7),
        91 => Size(ControlFlags::CS8),
        92 => Control(ControlFlags::PARENB),
        93 => Control(ControlFlags::PARODD),
        // 128, the input speed: Linux has one for both
        129 => Mode::Speed,
        _ => return None,
    })
}

/// Bits per second to what termios calls them. On a pty they mean nothing but to programs that pace
/// their output by them.
fn speed(bits_per_second: u32) -> Option<BaudRate> {
    Some(match bits_per_second {
        50 => BaudRate::B50,
        75 => BaudRate::B75,
        110 => BaudRate::B110,
        134 => BaudRate::B134,
        150 => BaudRate::B150,
        200 => BaudRate::B200,
        300 => BaudRate::B300,
        600 => BaudRate::B600,
        1200 => BaudRate::B1200,
        1800 => BaudRate::B1800,
        2400 => BaudRate::B2400,
        4800 => BaudRate::B4800,
        9600 => BaudRate::B9600,
        19200 => BaudRate::B19200,
        38400 => BaudRate::B38400,
        57600 => BaudRate::B57600,
        115_200 => BaudRate::B115200,
        230_400 => BaudRate::B230400,
        460_800 => BaudRate::B460800,
        921_600 => BaudRate::B921600,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::termios::{SetArg, tcgetattr, tcsetattr};

    fn pty() -> nix::pty::OpenptyResult {
        nix::pty::openpty(None, None).unwrap()
    }

    /// Every opcode of RFC 4254 §8 and RFC 8160 that Linux has a word for.
    #[test]
    fn the_table_is_complete_and_names_everything_once() {
        let known: Vec<u8> = (0..=255).filter(|opcode| mode(*opcode).is_some()).collect();
        let expected: Vec<u8> = (1..=10)
            .chain(12..=14)
            .chain([16, 18])
            .chain(30..=42)
            .chain(50..=62)
            .chain(70..=75)
            .chain(90..=93)
            .chain([129])
            .collect();
        assert_eq!(known, expected);
        for one in &known {
            for other in known.iter().filter(|other| *other > one) {
                assert_ne!(mode(*one), mode(*other), "{one} and {other}");
            }
        }
    }

    #[test]
    fn a_real_terminal_takes_them() {
        let pty = pty();
        let mut termios = tcgetattr(&pty.slave).unwrap();
        let modes = [
            (1, 255), // VINTR off
            (3, 8),   // VERASE ^H
            (53, 0),  // ECHO off
            (36, 0),  // ICRNL off
            (42, 1),  // IUTF8
            (72, 0),  // ONLCR off
            (129, 9600),
            (11, 3),  // VDSUSP: not on Linux
            (200, 1), // nobody's
        ];
        apply(&mut termios, &modes);
        tcsetattr(&pty.slave, SetArg::TCSANOW, &termios).unwrap();
        let read = tcgetattr(&pty.slave).unwrap();
        assert_eq!(read.control_chars[SpecialCharacterIndices::VINTR as usize], 0);
        assert_eq!(read.control_chars[SpecialCharacterIndices::VERASE as usize], 8);
        assert!(!read.local_flags.contains(LocalFlags::ECHO));
        assert!(read.local_flags.contains(LocalFlags::ICANON));
        assert!(!read.input_flags.contains(InputFlags::ICRNL));
        assert!(read.input_flags.contains(InputFlags::IUTF8));
        assert!(!read.output_flags.contains(OutputFlags::ONLCR));
        assert_eq!((read.control_flags & ControlFlags::CBAUD).bits(), BaudRate::B9600 as u32);
    }

    #[test]
    fn a_size_is_set_by_the_mode_that_is_on() {
        let mut termios = tcgetattr(&pty().slave).unwrap();
        apply(&mut termios, &[(90, 1), (91, 0)]);
        assert_eq!(termios.control_flags & ControlFlags::CSIZE, ControlFlags::CS7);
        apply(&mut termios, &[(90, 0), (91, 1)]);
        assert_eq!(termios.control_flags & ControlFlags::CSIZE, ControlFlags::CS8);
    }
}

use proptest::prelude::*;

use super::*;

/// What a terminal of that size shows once these bytes were written to it.
fn shown(columns: u16, rows: u16, bytes: &[u8]) -> vt100::Screen {
    let mut parser = parser(columns, rows);
    parser.process(bytes);
    parser.screen().clone()
}

fn drawn(columns: u16, rows: u16, bytes: &[u8]) -> Screen {
    let mut screen = Screen::new(columns, rows);
    assert!(screen.write(bytes));
    screen
}

fn own(screen: &Screen) -> &vt100::Screen {
    screen.parser.as_ref().unwrap().screen()
}

#[test]
fn somebody_who_comes_back_sees_the_same_screen() {
    let bytes = b"\x1b[1;31mred\x1b[m plain\r\n\x1b[48;2;1;2;3mblue\x1b[m\x1b[?2004h\x1b[?1006h\
        \x1b[?1002h\x1b]2;title \xc3\xa9\x07\x1b[?25l\x1b[5 q\x1b[4;7H";
    let screen = drawn(40, 10, bytes);
    let redraw = screen.redraw();
    let again = shown(40, 10, &redraw);
    assert_eq!(again.contents(), "red plain\nblue");
    assert_eq!(again.state_formatted(), own(&screen).state_formatted());
    assert_eq!(again.cursor_position(), (3, 6));
    assert!(again.bracketed_paste() && again.hide_cursor());
    assert_eq!(again.mouse_protocol_mode(), vt100::MouseProtocolMode::ButtonMotion);
    let text = String::from_utf8(redraw).unwrap();
    assert!(text.contains("\x1b]2;title é\x07"), "{text:?}");
}

#[test]
fn behind_the_alternate_screen_is_the_primary_one() {
    let screen = drawn(40, 10, b"$ vim\r\n\x1b[?1049h\x1b[2J\x1b[5;5Hinside");
    let redraw = screen.redraw();
    let again = shown(40, 10, &redraw);
    assert!(again.alternate_screen());
    assert_eq!(again.contents().trim_start(), "inside");
    let left = shown(40, 10, &[&redraw[..], b"\x1b[?1049lout"].concat());
    assert!(!left.alternate_screen());
    assert_eq!(left.contents(), "$ vim\nout");
}

#[test]
fn what_the_client_showed_before_goes_to_its_scrollback() {
    let screen = drawn(20, 5, b"new");
    let mut parser =
        vt100::Parser::new(NonZeroU16::new(5).unwrap(), NonZeroU16::new(20).unwrap(), 100);
    parser.process(b"first\r\nsecond");
    parser.process(&screen.redraw());
    assert_eq!(parser.screen().contents(), "new");
    parser.screen_mut().set_scrollback(5);
    assert!(parser.screen().contents().starts_with("first\nsecond"));
}

#[test]
fn a_redraw_in_the_middle_of_a_sequence_does_not_break_it() {
    let mut screen = drawn(40, 10, b"a\x1b[?1049hb\x1b[3");
    screen.redraw();
    screen.write(b"1mred");
    assert_eq!(own(&screen).contents(), "bred");
    assert_eq!(own(&screen).fgcolor(), vt100::Color::Idx(1));
}

#[test]
fn a_saved_screen_comes_back() {
    let screen = drawn(90, 30, b"$ \x1b[?1049hvim\x1b]0;t\x07\x1b[?2004h");
    let state = screen.save();
    let again = Screen::load(&state).unwrap();
    assert_eq!(again.save(), state);
    assert_eq!(again.redraw(), screen.redraw());
    let bytes = postcard::to_stdvec(&state).unwrap();
    assert_eq!(postcard::from_bytes::<ScreenState>(&bytes).unwrap(), state);
}

#[test]
fn a_snapshot_can_not_ask_for_more_than_a_guest() {
    let state = drawn(80, 24, b"x").save();
    let wrong = [
        ScreenState { columns: 0, ..state.clone() },
        ScreenState { columns: MOST_COLUMNS + 1, ..state.clone() },
        ScreenState { rows: u16::MAX, ..state.clone() },
        ScreenState { primary: vec![b'x'; MOST_SAVED + 1], ..state.clone() },
        ScreenState { title: vec![b'x'; MOST_TITLE + 1], ..state.clone() },
    ];
    for state in wrong {
        assert!(matches!(Screen::load(&state), Err(StateError::Invalid { .. })), "{state:?}");
    }
}

#[test]
fn a_screen_is_never_larger_than_its_bound() {
    let mut screen = Screen::new(u16::MAX, u16::MAX);
    assert_eq!(own(&screen).size().1.get(), MOST_COLUMNS);
    screen.resize(0, 0);
    assert_eq!(own(&screen).size().1.get(), 80);
    screen.resize(u16::MAX, 1);
    assert_eq!(own(&screen).size().1.get(), MOST_COLUMNS);
    // A colour of its own for each cell: too much to save, so it is saved blank.
    let mut screen = Screen::new(MOST_COLUMNS, MOST_ROWS);
    for n in 0..u32::from(MOST_COLUMNS) * u32::from(MOST_ROWS) {
        let (r, g, b) = (n % 256, n / 256 % 256, n % 251);
        screen.write(format!("\x1b[38;2;{r};{g};{b};48;2;{b};{g};{r}mx").as_bytes());
    }
    let state = screen.save();
    assert!(state.primary.is_empty() && state.columns == MOST_COLUMNS);
    Screen::load(&state).unwrap();
}

#[test]
fn a_title_is_short_text_and_nothing_else() {
    let long = format!("\x1b]2;{}\x07", "é".repeat(400));
    let screen = drawn(80, 24, long.as_bytes());
    assert_eq!(screen.parser.as_ref().unwrap().callbacks().0.len(), MOST_TITLE);
    let screen = drawn(80, 24, b"\x1b]2;a\xc2\x9bb\xff\x07");
    assert_eq!(screen.parser.as_ref().unwrap().callbacks().0, "ab\u{fffd}".as_bytes());
}

#[test]
fn a_parser_that_panics_is_replaced_and_at_last_given_up() {
    let mut screen = drawn(80, 24, b"x");
    for n in 1..=MOST_PANICS {
        assert!(screen.parser.is_some());
        screen.guarded(|_| panic!("one of vt100's, on purpose"));
        assert_eq!(screen.panics, n);
    }
    assert!(screen.parser.is_none());
    screen.write(b"y");
    screen.resize(10, 10);
    assert!(screen.redraw().ends_with(b"\x1b[H\x1b[J"));
    Screen::load(&screen.save()).unwrap();
}

#[test]
fn drawing_that_costs_too_much_is_left_out() {
    let mut screen = Screen::new(MOST_COLUMNS, MOST_ROWS);
    let begun = thread_time();
    // Each repeats a character 65,535 times.
    assert!(!screen.write(&b"x\x1b[65535b".repeat(100_000)));
    assert!(thread_time() - begun < 10 * DRAW_LIMIT);
    assert!(screen.write(b"\x1bcstill here"));
    assert_eq!(own(&screen).contents(), "still here");
}

/// Bytes as hostile terminals have them: mostly sequences that a parser looks at closely.
fn output() -> impl Strategy<Value = Vec<u8>> {
    let number = || prop_oneof![0..6u32, 0..250u32, Just(65535), any::<u32>()];
    let csi = (
        prop::sample::select(vec!["", "?", " ", ">"]),
        prop::collection::vec(number(), 0..4),
        prop::sample::select(b"@ABCDEFGHJKLMPSTXbdfhlmqrtsu`".to_vec()),
    )
        .prop_map(|(mark, numbers, end)| {
            let numbers: Vec<_> = numbers.iter().map(u32::to_string).collect();
            let (before, after) = if mark == " " { ("", " ") } else { (mark, "") };
            format!("\x1b[{before}{}{after}{}", numbers.join(";"), end as char).into_bytes()
        });
    let mode = (prop::sample::select(vec![1, 6, 25, 47, 1000, 1049, 2004]), any::<bool>())
        .prop_map(|(mode, on)| format!("\x1b[?{mode}{}", if on { 'h' } else { 'l' }).into_bytes());
    let text = prop::sample::select(vec![
        "a",
        "\u{301}",
        "\u{fe0f}",
        "界",
        "☺\u{fe0f}",
        "\r",
        "\n",
        "\t",
        "\u{8}",
        "\x1bM",
        "\x1b7",
        "\x1b8",
        "\x1bc",
        "\x1bD",
        "\x0b",
        "\u{17d8}",
        "lines of words that are longer than most windows are wide",
    ])
    .prop_map(|text: &str| text.as_bytes().to_vec());
    let piece = prop_oneof![
        4 => csi,
        2 => mode,
        4 => text,
        1 => prop::collection::vec(any::<u8>(), 0..20),
        1 => prop::collection::vec(any::<u8>(), 0..20).prop_map(|b| [b"\x1b]2;", &b[..], b"\x07"].concat()),
    ];
    prop::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn whatever_is_written_the_screen_stays_usable(
        outputs in prop::collection::vec((output(), 0..30u16, 0..12u16), 1..6),
    ) {
        let mut screen = Screen::new(20, 6);
        for (bytes, columns, rows) in outputs {
            screen.write(&bytes);
            screen.resize(columns, rows);
            let redraw = screen.redraw();
            prop_assert!(redraw.len() < 100_000);
            let state = screen.save();
            let again = Screen::load(&state).unwrap();
            prop_assert!(again.parser.is_some(), "what was saved makes the parser panic");
        }
    }
}

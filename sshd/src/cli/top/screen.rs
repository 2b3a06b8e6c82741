//! The terminal while `top` has it: another screen, keys as they are pressed, and all as before at the end.

use super::{Order, Row, size};
use crossterm::cursor::{Hide, MoveTo, Show};
use crossterm::event::{Event, KeyCode, KeyEvent, KeyModifiers, poll, read};
use crossterm::style::{Attribute, Print, SetAttribute};
use crossterm::terminal::{
    BeginSynchronizedUpdate, Clear, ClearType, EndSynchronizedUpdate, EnterAlternateScreen,
    LeaveAlternateScreen, disable_raw_mode, enable_raw_mode, size as window,
};
use crossterm::{execute, queue};
use std::io::{self, Write};
use std::time::Instant;

pub struct Screen {
    out: io::Stdout,
}

/// What happened.
#[derive(Debug, PartialEq)]
pub enum Key {
    Quit,
    Sort(Order),
    /// The window has another size.
    Redraw,
    /// Nothing, in time.
    Time,
}

impl Screen {
    pub fn take() -> io::Result<Self> {
        enable_raw_mode()?;
        let mut screen = Self { out: io::stdout() };
        execute!(screen.out, EnterAlternateScreen, Hide)?;
        Ok(screen)
    }

    pub fn draw(&mut self, head: &str, rows: &[Row], order: Order) -> io::Result<()> {
        // A serial line does not know its size.
        let size = window().ok().filter(|(width, height)| *width > 0 && *height > 0);
        let (width, height) = size.unwrap_or((80, 24));
        let (width, height) = (usize::from(width), usize::from(height));
        queue!(self.out, BeginSynchronizedUpdate, MoveTo(0, 0), Clear(ClearType::All))?;
        queue!(self.out, Print(cut(head, width)), MoveTo(0, 2))?;
        queue!(self.out, SetAttribute(Attribute::Reverse))?;
        queue!(self.out, Print(cut(&format!("{:<width$}", header(order)), width)))?;
        queue!(self.out, SetAttribute(Attribute::Reset))?;
        for (n, row) in rows.iter().take(height.saturating_sub(3)).enumerate() {
            let at = u16::try_from(n + 3).unwrap_or(u16::MAX);
            queue!(self.out, MoveTo(0, at), Print(cut(&line(row), width)))?;
        }
        queue!(self.out, EndSynchronizedUpdate)?;
        self.out.flush()
    }

    /// Waits for a key, until that time.
    pub fn key(&mut self, until: Instant) -> io::Result<Key> {
        while poll(until.saturating_duration_since(Instant::now()))? {
            match read()? {
                Event::Key(key) => {
                    if let Some(key) = meaning(key) {
                        return Ok(key);
                    }
                }
                Event::Resize(..) => return Ok(Key::Redraw),
                _ => {}
            }
        }
        Ok(Key::Time)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = execute!(self.out, Show, LeaveAlternateScreen);
        let _ = disable_raw_mode();
    }
}

fn meaning(key: KeyEvent) -> Option<Key> {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    Some(match key.code {
        KeyCode::Char('q') | KeyCode::Esc => Key::Quit,
        KeyCode::Char('c') if control => Key::Quit,
        KeyCode::Char('c') => Key::Sort(Order::Cpu),
        KeyCode::Char('m') => Key::Sort(Order::Memory),
        KeyCode::Char('d') => Key::Sort(Order::Disk),
        KeyCode::Char('s') => Key::Sort(Order::Sessions),
        KeyCode::Char('n') => Key::Sort(Order::Name),
        KeyCode::Char('l') if control => Key::Redraw,
        _ => return None,
    })
}

/// The columns' names; the one that is sorted by is marked.
pub fn header(order: Order) -> String {
    let mark = |column: Order, name: &str| {
        if column == order { format!("{name}*") } else { name.to_owned() }
    };
    columns(
        &mark(Order::Name, "ACCOUNT"),
        "STATE",
        &mark(Order::Sessions, "SESS"),
        &mark(Order::Cpu, "CPU"),
        "HELD",
        &mark(Order::Memory, "MEMORY"),
        &mark(Order::Disk, "DISK"),
        "IN/s",
        "OUT/s",
        "WHY",
    )
}

pub fn line(row: &Row) -> String {
    let bytes = |bytes: Option<u64>| bytes.map_or("-".into(), size::show);
    let percent = |share: Option<f64>| share.map_or("-".into(), |share| format!("{share:.1}"));
    columns(
        &row.account,
        &row.state,
        &row.sessions.to_string(),
        &percent(row.cpu),
        &percent(row.held),
        &bytes(row.memory),
        &bytes(row.disk),
        &bytes(row.traffic.map(|(received, _)| received)),
        &bytes(row.traffic.map(|(_, sent)| sent)),
        &row.why,
    )
}

#[expect(clippy::too_many_arguments, reason = "a line, from left to right")]
fn columns(
    account: &str,
    state: &str,
    sessions: &str,
    cpu: &str,
    held: &str,
    memory: &str,
    disk: &str,
    received: &str,
    sent: &str,
    why: &str,
) -> String {
    let line = format!(
        "{account:<20} {state:<10} {sessions:>5} {cpu:>7} {held:>6} {memory:>10} {disk:>10} {received:>9} {sent:>9}  {why}"
    );
    line.trim_end().to_owned()
}

/// At most so many characters, none of which moves the cursor.
fn cut(line: &str, width: usize) -> String {
    line.chars().take(width).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_fits_and_says_nothing_to_the_terminal() {
        assert_eq!(cut("awake: \x1b[2Jmake", 14), "awake:  [2Jmak");
        let row = Row {
            account: "alice".into(),
            state: "lingering".into(),
            why: "awake: make (pid 812), 97 % CPU".into(),
            sessions: 2,
            cpu: Some(97.25),
            held: Some(2.0),
            memory: Some(5 << 20),
            disk: None,
            traffic: Some((2 << 10, 3 << 20)),
        };
        let line = line(&row);
        assert!(line.starts_with("alice                lingering      2    97."), "{line}");
        assert!(
            line.contains("    2.0      5 MiB")
                && line.contains("    2 KiB     3 MiB  awake")
                && line.ends_with("97 % CPU"),
            "{line}"
        );
        let at = |text: &str, word: &str| text.find(word).unwrap();
        assert_eq!(at(&header(Order::Cpu), "WHY"), at(&line, "awake"));
        assert!(header(Order::Memory).contains("MEMORY*"));
    }

    #[test]
    fn keys_mean_what_the_help_says() {
        let key = |c| KeyEvent::new(KeyCode::Char(c), KeyModifiers::NONE);
        let control = |c| KeyEvent::new(KeyCode::Char(c), KeyModifiers::CONTROL);
        assert_eq!(meaning(key('c')), Some(Key::Sort(Order::Cpu)));
        assert_eq!(meaning(control('c')), Some(Key::Quit));
        assert_eq!(meaning(key('x')), None);
    }
}

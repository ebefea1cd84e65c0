//! Tables, JSON, sizes, rates and progress.

use std::{
    borrow::Cow,
    fmt::{Display, Write as _},
    io::{self, IsTerminal, Write},
    path::Path,
    sync::{
        OnceLock,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use comfy_table::{CellAlignment, Color, ContentArrangement, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use serde_json::value::to_raw_value;

#[cfg_attr(not(feature = "serve"), allow(dead_code))]
mod caller;

use crate::exit::{Failure, Result};
#[cfg(feature = "serve")]
pub(crate) use caller::{End, Step, end, to_caller};
pub(crate) use caller::{Piece, send_file};

/// Work that finishes sooner shows no progress.
const PROGRESS_AFTER: Duration = Duration::from_secs(1);
/// The columns of a terminal that does not know its width.
const WIDTH_UNKNOWN: u16 = 80;
/// How often the bar is redrawn, also without progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// The kind of a text. It determines which control characters are layout and how the others are
/// escaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One line: every control character comes from a name or a message, and none is layout.
    Line,
    /// A table cell, which may have several lines.
    Cell,
    /// The bytes of a log: newline and tab are part of it.
    Log,
    /// JSON: whitespace outside of strings is layout, and the only control characters in strings
    /// are DEL and C1.
    Json,
}

/// Escapes a text for a terminal, so that a name or a log cannot control it. Shows control
/// characters (C0, DEL, C1), bytes that are not UTF-8, and characters that change the direction of
/// text or begin a line as printable escape sequences.
pub(crate) fn visible(bytes: &[u8], kind: Kind) -> Cow<'_, [u8]> {
    let is_plain =
        |byte: &u8| (b' '..=b'~').contains(byte) || (*byte == b'\n' && kind != Kind::Line);
    if bytes.iter().all(is_plain) {
        return Cow::Borrowed(bytes);
    }
    let mut text = String::with_capacity(bytes.len() + 16);
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            let layout = match c {
                '\n' => kind != Kind::Line,
                '\t' | '\r' if kind == Kind::Json => true,
                '\t' => kind == Kind::Log,
                _ => false,
            };
            let turns = matches!(
                c,
                '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
            );
            // Writing to a string cannot fail.
            let _ = match u32::from(c) {
                _ if layout || !(c.is_control() || turns) => {
                    text.push(c);
                    Ok(())
                }
                code if kind == Kind::Json => write!(text, "\\u{code:04x}"),
                code @ ..0x80 => write!(text, "\\x{code:02x}"),
                code => write!(text, "\\u{{{code:x}}}"),
            };
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    if text.as_bytes() == bytes { Cow::Borrowed(bytes) } else { Cow::Owned(text.into_bytes()) }
}

static SHOWN: OnceLock<bool> = OnceLock::new();

/// Whether standard output gets escapes, as a terminal does. A pipe or a file gets every byte
/// unchanged, unless a service has sent it.
pub(crate) fn is_shown() -> bool {
    *SHOWN.get_or_init(|| io::stdout().is_terminal())
}

/// Escapes all that goes to standard output from now on, since another process has made it. Call it
/// before anything is printed.
#[cfg(feature = "serve")]
pub(crate) fn escape_all() {
    // If something was printed before, nothing changes.
    let _ = SHOWN.set(true);
}

/// Escapes a text for standard output, unless that gets every byte.
pub(crate) fn for_stdout(bytes: &[u8], kind: Kind) -> Cow<'_, [u8]> {
    if is_shown() { visible(bytes, kind) } else { Cow::Borrowed(bytes) }
}

/// Escapes a text for standard error, also if that is a file: a message or a log event stays on one
/// line, even if a name in it has a line break.
pub(crate) fn for_stderr(bytes: &[u8], kind: Kind) -> Cow<'_, [u8]> {
    visible(bytes, kind)
}

/// Writes a line to standard output.
pub(crate) fn line(text: impl Display) -> Result {
    if caller::is_set() {
        return caller::send(Piece::Line(text.to_string()));
    }
    write_out(&for_stdout(text.to_string().as_bytes(), Kind::Line))
}

/// Writes a note to standard error. A note is neither a failure nor part of the result.
pub(crate) fn notice(text: impl Display) {
    if caller::is_set() {
        // A caller that has gone misses it.
        let _ = caller::send(Piece::Note(text.to_string()));
        return;
    }
    let text =
        [&for_stderr(format!("envelog: note: {text}").as_bytes(), Kind::Line), &b"\n"[..]].concat();
    // A closed standard error is ignored: there is no other place for the note.
    let _ = io::stderr().write_all(&text);
}

/// Waits for the given time. Fails as soon as the reader of standard output is gone, since there is
/// then no more work to do.
pub(crate) fn wait_while_read(time: Duration) -> Result {
    let out = io::stdout();
    // Requests no event: poll reports an error or a hang-up regardless.
    let mut fds = [PollFd::new(&out, PollFlags::empty())];
    let timeout = Timespec::try_from(time).ok();
    match poll(&mut fds, timeout.as_ref()) {
        // A signal ends the wait; the caller checks again.
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(Failure::output(&error.into())),
    }
    if fds.iter().any(|fd| fd.revents().intersects(PollFlags::ERR | PollFlags::HUP)) {
        return Err(Failure::output(&io::ErrorKind::BrokenPipe.into()));
    }
    Ok(())
}

/// A path as text for JSON. Bytes that are not UTF-8 are replaced.
pub(crate) fn path(path: &Path) -> String {
    path.display().to_string()
}

/// A value as JSON in one line.
pub(crate) fn json_line(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| no_json(&error))
}

fn no_json(error: &serde_json::Error) -> Failure {
    Failure::other(format!("cannot write this as JSON: {error}"))
}

/// Writes a value to standard output, as indented JSON.
pub(crate) fn json(value: &impl Serialize) -> Result {
    if caller::is_set() {
        let answer = to_raw_value(value).map_err(|error| no_json(&error))?;
        return caller::send(Piece::Answer(answer));
    }
    let text = serde_json::to_string_pretty(value).map_err(|error| no_json(&error))?;
    // Escapes change nothing for a program that reads it.
    write_out(&visible(text.as_bytes(), Kind::Json))
}

/// Writes a JSON document that another process has made, as [`json`] writes it.
#[cfg(feature = "serve")]
pub(crate) fn json_of_text(compact: &str) -> Result {
    write_out(&visible(caller::indented(compact).as_bytes(), Kind::Json))
}

fn write_out(text: &[u8]) -> Result {
    let mut out = io::stdout().lock();
    out.write_all(text)
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .map_err(|error| Failure::output(&error))
}

/// Standard error as the target of log events: each event is one write of one line.
pub(crate) struct Events;

impl Write for Events {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let (line, end) =
            event.strip_suffix(b"\n").map_or((event, &b""[..]), |line| (line, &b"\n"[..]));
        let text = [&for_stderr(line, Kind::Line), end].concat();
        io::stderr().write_all(&text).map(|()| event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// A table. Its cells are escaped when it is written to a terminal.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Table {
    header: Vec<String>,
    /// The columns, from 0, that are right-aligned.
    numbers: Vec<usize>,
    rows: Vec<Vec<Cell>>,
}

/// A cell, which may have several lines.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Cell {
    text: String,
    /// Whether it is green or red, where colours are enabled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    good: Option<bool>,
}

impl Cell {
    pub(crate) fn new(text: impl ToString) -> Self {
        Self { text: text.to_string(), good: None }
    }

    /// A cell that needs escapes loses its colour.
    fn drawn(&self) -> comfy_table::Cell {
        match (for_stdout(self.text.as_bytes(), Kind::Cell), self.good) {
            (Cow::Borrowed(_), None) => comfy_table::Cell::new(&self.text),
            (Cow::Borrowed(_), Some(good)) => {
                comfy_table::Cell::new(&self.text).fg(if good { Color::Green } else { Color::Red })
            }
            (Cow::Owned(text), _) => comfy_table::Cell::new(String::from_utf8_lossy(&text)),
        }
    }
}

impl<T: ToString> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text)
    }
}

/// An empty table. Columns in `numbers` (from 0) are right-aligned.
pub(crate) fn table(header: &[&str], numbers: &[usize]) -> Table {
    let header = header.iter().map(|name| (*name).to_owned()).collect();
    Table { header, numbers: numbers.to_owned(), rows: Vec::new() }
}

impl Table {
    pub(crate) fn add_row(&mut self, row: impl IntoIterator<Item = impl Into<Cell>>) -> &mut Self {
        self.rows.push(row.into_iter().map(Into::into).collect());
        self
    }

    fn drawn(&self) -> comfy_table::Table {
        let mut table = blank();
        if !self.header.is_empty() {
            table.set_header(&self.header);
        }
        for &index in &self.numbers {
            if let Some(column) = table.column_mut(index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        for row in &self.rows {
            table.add_row(row.iter().map(Cell::drawn));
        }
        table
    }
}

/// A table without columns, for the width of the terminal.
fn blank() -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic);
    let width = match table.width() {
        // The terminal does not know its width.
        Some(0) => Some(WIDTH_UNKNOWN),
        width => width,
    };
    if std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) {
        // This also forgets the width of the terminal.
        table.force_no_tty();
    }
    if let Some(width) = width {
        table.set_width(width);
    }
    table
}

/// Writes a table to standard output, regardless of the terminal's width.
pub(crate) fn print_wide_table(table: &Table) -> Result {
    if caller::is_set() {
        return caller::send(Piece::WideTable(table.clone()));
    }
    write_out(table.drawn().to_string().as_bytes())
}

/// Writes a table to standard output. If the terminal is too narrow, writes each row as a table of
/// its own with one line per column.
pub(crate) fn print_table(table: &Table) -> Result {
    if caller::is_set() {
        return caller::send(Piece::Table(table.clone()));
    }
    let drawn = table.drawn();
    let needed = drawn
        .column_max_content_widths()
        .iter()
        .map(|width| usize::from(*width) + 3)
        .sum::<usize>()
        + 1;
    if drawn.width().is_none_or(|width| needed <= usize::from(width)) || table.header.is_empty() {
        return write_out(drawn.to_string().as_bytes());
    }
    table.rows.iter().try_for_each(|row| {
        let mut upright = blank();
        for (name, cell) in table.header.iter().zip(row) {
            upright.add_row([comfy_table::Cell::new(name), cell.drawn()]);
        }
        write_out(upright.to_string().as_bytes())
    })
}

/// A cell in green or red, where colours are enabled.
pub(crate) fn verdict(text: impl ToString, good: bool) -> Cell {
    Cell { text: text.to_string(), good: Some(good) }
}

/// A human-readable size: `17.3 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

/// Megabytes (10^6 bytes) per second.
pub(crate) fn mb_per_s(bytes: u64, elapsed: Duration) -> f64 {
    bytes as f64 / 1e6 / elapsed.as_secs_f64().max(1e-9)
}

/// A count with thousands separators: `1,234,567`.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A time as RFC 3339 with six digits, so that times sort as text, from microseconds since the Unix
/// epoch.
pub(crate) fn moment(unix_us: u64) -> String {
    i64::try_from(unix_us)
        .ok()
        .and_then(|us| jiff::Timestamp::from_microsecond(us).ok())
        .map_or_else(
            || format!("{unix_us} us"),
            |timestamp| timestamp.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string(),
        )
}

/// Whether errors and results are JSON.
static AS_JSON: OnceLock<bool> = OnceLock::new();

/// Hides the progress of this process if its output is JSON. Call it once, before any command.
pub(crate) fn set_json(json: bool) {
    // A second call changes nothing.
    let _ = AS_JSON.set(json);
}

/// Whether progress may be shown.
fn shows_progress() -> bool {
    !caller::is_set() && !AS_JSON.get().copied().unwrap_or(false) && io::stderr().is_terminal()
}

/// Progress of long work: a bar on standard error, if that is a terminal, the output is not JSON, and
/// the work takes longer than a second.
pub(crate) struct Progress {
    bar: ProgressBar,
    /// The progress as a caller in another process has to know it.
    told: Option<caller::Told>,
    /// The thread that draws the bar. Dropping the sender ends it.
    showing: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Progress in bytes, with the total if it is known.
    pub(crate) fn bytes(total: Option<u64>) -> Self {
        let template = match total {
            Some(_) => "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left",
            None => "{spinner} {bytes} {bytes_per_sec}",
        };
        Self::new(total, template, shows_progress()).told("bytes", total)
    }

    /// Progress in bytes while logs or acknowledgements go to standard output. Shows no bar if
    /// standard output is a terminal, where the two would interleave.
    pub(crate) fn beside_output(total: Option<u64>) -> Self {
        if io::stdout().is_terminal() { Self::none() } else { Self::bytes(total) }
    }

    /// Progress in steps, with the name of the current step.
    pub(crate) fn steps(total: u64) -> Self {
        Self::new(Some(total), "{bar:30} {pos}/{len} {elapsed} {msg}", shows_progress())
            .told("steps", Some(total))
    }

    /// Shows nothing.
    pub(crate) fn none() -> Self {
        Self::new(None, "", false)
    }

    fn new(total: Option<u64>, template: &str, show: bool) -> Self {
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::hidden());
        let style =
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = bar.with_style(style);
        let showing = show.then(|| {
            let (sender, ended) = channel();
            let bar = bar.clone();
            let wait = move || {
                if ended.recv_timeout(PROGRESS_AFTER) == Err(RecvTimeoutError::Timeout) {
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                    bar.enable_steady_tick(PROGRESS_EVERY);
                }
            };
            (sender, thread::spawn(wait))
        });
        Self { bar, told: None, showing }
    }

    /// Progress that a caller in another process is told too.
    fn told(mut self, unit: &str, total: Option<u64>) -> Self {
        self.told = caller::is_set().then(|| caller::Told::new(unit, total));
        self
    }

    /// Names the current step.
    pub(crate) fn say(&self, what: impl Into<Cow<'static, str>>) {
        let what = what.into();
        if let Some(told) = &self.told {
            told.say(&what);
        }
        self.bar.set_message(
            String::from_utf8_lossy(&visible(what.as_bytes(), Kind::Line)).into_owned(),
        );
    }

    pub(crate) fn add(&self, more: u64) {
        self.bar.inc(more);
    }

    pub(crate) fn set(&self, done: u64) {
        if let Some(told) = &self.told {
            told.set(done);
        }
        self.bar.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.showing.take() {
            drop(sender);
            let _ = thread.join();
        }
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(bytes: &[u8], kind: Kind) -> String {
        String::from_utf8_lossy(&visible(bytes, kind)).into_owned()
    }

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        for kind in [Kind::Line, Kind::Cell, Kind::Log, Kind::Json] {
            // Each byte alone, each character of the relevant planes, and complete escape
            // sequences.
            for byte in 0..=255_u8 {
                let text = shown(&[b'a', byte, b'b'], kind);
                let layout = |c: char| match c {
                    '\n' => kind != Kind::Line,
                    '\t' => matches!(kind, Kind::Log | Kind::Json),
                    '\r' => kind == Kind::Json,
                    _ => false,
                };
                assert!(
                    text.chars().all(|c| !c.is_control() || layout(c)),
                    "{byte:#x} as {kind:?}: {text:?}"
                );
                assert!(!text.contains('\u{fffd}'), "{byte:#x} as {kind:?}: {text:?}");
            }
            let turning = ('\u{2028}'..='\u{202e}').chain('\u{2066}'..='\u{2069}');
            let turning = turning.chain(['\u{61c}', '\u{200e}', '\u{200f}']);
            for c in ('\u{80}'..='\u{9f}').chain(turning) {
                let text = shown(format!("a{c}b").as_bytes(), kind);
                assert!(
                    text.is_ascii() && text.starts_with('a') && text.ends_with('b'),
                    "{c:?} as {kind:?}: {text:?}"
                );
            }
        }
    }

    #[test]
    fn what_is_escaped_can_be_read_and_the_rest_stays() {
        for (bytes, kind, expected) in [
            (&b"\x1b]0;title\x07\x1b[2J"[..], Kind::Line, "\\x1b]0;title\\x07\\x1b[2J"),
            (b"two\nlines\tand\x7f", Kind::Line, "two\\x0alines\\x09and\\x7f"),
            (b"two\nlines\tand\r", Kind::Log, "two\nlines\tand\\x0d"),
            (b"two\nlines\t", Kind::Cell, "two\nlines\\x09"),
            (b"\x9b31m and \xc2\x9b31m", Kind::Log, "\\x9b31m and \\u{9b}31m"),
            (b"\xe2\x80", Kind::Log, "\\xe2\\x80"),
            ("abc\u{202e}cba".as_bytes(), Kind::Line, "abc\\u{202e}cba"),
            (
                "{\n \"a\": \"\u{9b}\u{202e}\u{7f}\"}".as_bytes(),
                Kind::Json,
                "{\n \"a\": \"\\u009b\\u202e\\u007f\"}",
            ),
            ("日志 ünïcödé 🙂 \\x1b".as_bytes(), Kind::Line, "日志 ünïcödé 🙂 \\x1b"),
        ] {
            assert_eq!(shown(bytes, kind), expected);
        }
        for plain in ["plain text", "日志 🙂"] {
            assert!(matches!(visible(plain.as_bytes(), Kind::Line), Cow::Borrowed(_)), "{plain}");
        }
    }

    #[test]
    fn json_on_a_terminal_says_the_same() {
        let value = "\u{0}\u{1b}\u{7f}\u{85}\u{9b}\u{202e}\u{2069}\n\t\r\"\\é";
        let text = serde_json::to_string_pretty(&[value]).unwrap_or_default();
        let parsed: Vec<String> =
            serde_json::from_slice(&visible(text.as_bytes(), Kind::Json)).unwrap_or_default();
        assert_eq!(parsed, [value]);
    }
}

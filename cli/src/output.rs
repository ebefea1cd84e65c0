//! Tables, JSON, sizes, rates and progress.

use std::{
    borrow::Cow,
    fmt::Display,
    io::{self, IsTerminal, Write},
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::{self, JoinHandle},
    time::Duration,
};

use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::exit::{Failure, Result};

/// Work that is done sooner shows no progress.
const PROGRESS_AFTER: Duration = Duration::from_secs(1);
/// How often a bar is drawn, also while nothing is done.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Writes a line to standard output.
pub(crate) fn line(text: impl Display) -> Result {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|error| Failure::output(&error))
}

/// Writes a value to standard output, as indented JSON.
pub(crate) fn json(value: &impl Serialize) -> Result {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::other(format!("cannot write this as JSON: {error}")))?;
    line(text)
}

/// An empty table. Columns in `numbers` (from 0) are set flush right.
pub(crate) fn table(header: &[&str], numbers: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
    if std::env::var_os("NO_COLOR").is_some() {
        table.force_no_tty();
    }
    if !header.is_empty() {
        table.set_header(header.iter().map(Cell::new));
    }
    for &index in numbers {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Writes a table to standard output; where the terminal is too narrow for it, a table a row, with a line a column.
pub(crate) fn print_table(table: &Table) -> Result {
    let needed = table.column_max_content_widths().iter().map(|width| usize::from(*width) + 3).sum::<usize>() + 1;
    let (Some(width), Some(header)) = (table.width(), table.header()) else { return line(table) };
    if needed <= usize::from(width) {
        return line(table);
    }
    table.row_iter().try_for_each(|row| {
        let mut upright = self::table(&[], &[]);
        for (name, cell) in header.cell_iter().zip(row.cell_iter()) {
            upright.add_row([Cell::new(name.content()), cell.clone()]);
        }
        line(upright)
    })
}

/// A word that is good news or bad, in the colour that says so where there are colours.
pub(crate) fn verdict(text: impl ToString, good: bool) -> Cell {
    Cell::new(text).fg(if good { Color::Green } else { Color::Red })
}

/// A size for people: `17.3 MiB`.
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

/// Millions of bytes in a second.
pub(crate) fn mb_per_s(bytes: u64, elapsed: Duration) -> f64 {
    bytes as f64 / 1e6 / elapsed.as_secs_f64().max(1e-9)
}

/// A count with its thousands set apart: `1,234,567`.
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

/// A moment as RFC 3339, from microseconds since the Unix epoch.
pub(crate) fn moment(unix_us: u64) -> String {
    i64::try_from(unix_us)
        .ok()
        .and_then(|us| jiff::Timestamp::from_microsecond(us).ok())
        .map_or_else(|| format!("{unix_us} us"), |timestamp| timestamp.to_string())
}

/// How far a long piece of work is: a bar on standard error, if that is a terminal and the work takes longer than a second.
pub(crate) struct Progress {
    bar: ProgressBar,
    /// Shows the bar when the time has come; to drop the sender ends the wait.
    showing: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Of so many bytes, where that is known.
    pub(crate) fn bytes(total: Option<u64>) -> Self {
        let template = match total {
            Some(_) => "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left",
            None => "{spinner} {bytes} {bytes_per_sec}",
        };
        Self::new(total, template, io::stderr().is_terminal())
    }

    /// Of so many bytes while logs or acknowledgements go to standard output; they would mix with a bar on one terminal.
    pub(crate) fn beside_output(total: Option<u64>) -> Self {
        if io::stdout().is_terminal() { Self::none() } else { Self::bytes(total) }
    }

    /// Of so many steps, the current one named.
    pub(crate) fn steps(total: u64) -> Self {
        Self::new(Some(total), "{bar:30} {pos}/{len} {elapsed} {msg}", io::stderr().is_terminal())
    }

    /// Nothing to be seen.
    pub(crate) fn none() -> Self {
        Self::new(None, "", false)
    }

    fn new(total: Option<u64>, template: &str, show: bool) -> Self {
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::hidden());
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
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
        Self { bar, showing }
    }

    /// What is being done now.
    pub(crate) fn say(&self, what: impl Into<Cow<'static, str>>) {
        self.bar.set_message(what);
    }

    pub(crate) fn add(&self, more: u64) {
        self.bar.inc(more);
    }

    pub(crate) fn set(&self, done: u64) {
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

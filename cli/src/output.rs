//! Tables, JSON, sizes, rates and progress.

use std::{
    fmt::Display,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::exit::{Failure, Result};

/// Work that is done sooner shows no progress.
const PROGRESS_AFTER: Duration = Duration::from_secs(1);

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
    table.set_header(header.iter().map(Cell::new));
    for &index in numbers {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
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
    total: Option<u64>,
    template: &'static str,
    done: u64,
    started: Instant,
    show: bool,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Of so many bytes, where that is known.
    pub(crate) fn bytes(total: Option<u64>) -> Self {
        let template = match total {
            Some(_) => "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left",
            None => "{spinner} {bytes} {bytes_per_sec}",
        };
        Self::new(total, template)
    }

    /// Of so many steps.
    pub(crate) fn steps(total: u64) -> Self {
        Self::new(Some(total), "{bar:30} {pos}/{len} {elapsed}")
    }

    fn new(total: Option<u64>, template: &'static str) -> Self {
        let show = io::stderr().is_terminal();
        Self { total, template, done: 0, started: Instant::now(), show, bar: None }
    }

    pub(crate) fn add(&mut self, more: u64) {
        self.set(self.done + more);
    }

    pub(crate) fn set(&mut self, done: u64) {
        self.done = done;
        if !self.show {
            return;
        }
        if self.bar.is_none() && self.started.elapsed() > PROGRESS_AFTER {
            let bar = self.total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
            let style = ProgressStyle::with_template(self.template).unwrap_or_else(|_| ProgressStyle::default_bar());
            self.bar = Some(bar.with_style(style));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

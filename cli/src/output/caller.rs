//! The output of a command that this process runs for a caller in another one: pieces, which the
//! caller prints as its own output.

use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::Table;
use crate::exit::{Failure, Result, Status};

/// How often a caller is told the progress.
const TELL_EVERY: Duration = Duration::from_millis(200);
/// The bytes of a file in one piece.
const FILE_PIECE_BYTES: usize = 768 << 10;

/// A piece of the output. On the wire each is one line of JSON.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Piece {
    /// A line for standard output.
    Line(String),
    /// The answer with `--json`.
    Answer(Box<RawValue>),
    /// A note for standard error.
    Note(String),
    Table(Table),
    WideTable(Table),
    Progress(Step),
    /// A part of the file that the command writes, in base64. The caller knows its name.
    File(String),
    /// The end of the command. Without it, the end is unknown.
    End(End),
}

/// How far a command is.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Step {
    /// `bytes` or `steps`.
    pub(crate) unit: String,
    pub(crate) total: Option<u64>,
    pub(crate) done: u64,
    /// What is under way.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) at: String,
}

/// How a command ended.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct End {
    /// The exit status.
    pub(crate) status: u8,
    /// The failure, as `--json` prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<Failure>,
}

impl End {
    pub(crate) fn of(result: Result) -> Self {
        let status = result.as_ref().map_or_else(Failure::status, |()| Status::Done);
        Self { status: status as u8, error: result.err() }
    }

    pub(crate) fn result(self) -> Result {
        match (self.error, Status::of_number(self.status)) {
            (None, Status::Done) => Ok(()),
            // An error is a failure, even if the service sent the status of a success with it.
            (Some(failure), Status::Done) => Err(failure.with_status(Status::Other)),
            (Some(failure), status) => Err(failure.with_status(status)),
            (None, status) => {
                let message = "the command has failed, and the service does not say why";
                Err(Failure::new(status, "failed", message))
            }
        }
    }
}

type Sink = Box<dyn Fn(Piece)>;

thread_local! {
    /// Takes the output of the command that this thread runs. Without it, the output goes to the
    /// standard streams.
    static SINK: RefCell<Option<Sink>> = const { RefCell::new(None) };
}

/// Runs a command on this thread whose output goes to `sink`.
pub(crate) fn to_caller<T>(sink: impl Fn(Piece) + 'static, command: impl FnOnce() -> T) -> T {
    /// Also after a panic, the next command of this thread has the standard streams.
    struct Reset;
    impl Drop for Reset {
        fn drop(&mut self) {
            SINK.set(None);
        }
    }
    SINK.set(Some(Box::new(sink)));
    let _reset = Reset;
    command()
}

/// Whether the output of this thread goes to a caller.
pub(super) fn is_set() -> bool {
    SINK.with_borrow(Option::is_some)
}

pub(super) fn send(piece: Piece) -> Result {
    SINK.with_borrow(|sink| {
        if let Some(sink) = sink {
            sink(piece);
        }
    });
    Ok(())
}

/// Tells the caller that the command has ended.
pub(crate) fn end(end: End) {
    let _ = send(Piece::End(end));
}

/// Sends a file to the caller. Returns `false` if there is none, and the file is to be written by
/// this process.
pub(crate) fn send_file(bytes: &[u8]) -> bool {
    if !is_set() {
        return false;
    }
    // An empty file is one empty piece.
    let pieces = bytes.chunks(FILE_PIECE_BYTES).chain(bytes.is_empty().then_some(bytes));
    pieces.for_each(|piece| drop(send(Piece::File(STANDARD.encode(piece)))));
    true
}

/// Progress that a caller is told, at most a few times a second.
#[derive(Debug)]
pub(super) struct Told {
    step: RefCell<Step>,
    told: Cell<Option<Instant>>,
}

impl Told {
    pub(super) fn new(unit: &str, total: Option<u64>) -> Self {
        let step = Step { unit: unit.to_owned(), total, done: 0, at: String::new() };
        Self { step: RefCell::new(step), told: Cell::new(None) }
    }

    pub(super) fn say(&self, what: &str) {
        what.clone_into(&mut self.step.borrow_mut().at);
    }

    pub(super) fn set(&self, done: u64) {
        self.step.borrow_mut().done = done;
        if self.told.get().is_some_and(|told| told.elapsed() < TELL_EVERY) {
            return;
        }
        self.told.set(Some(Instant::now()));
        let _ = send(Piece::Progress(self.step.borrow().clone()));
    }
}

/// JSON without white space between its tokens, indented as `serde_json` does it. Its fields stay in
/// their order, which a map in memory would not keep.
pub(super) fn indented(compact: &str) -> String {
    let mut text = String::with_capacity(compact.len() * 2);
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    let mut chars = compact.chars().peekable();
    let new_line = |text: &mut String, depth: usize| {
        text.push('\n');
        text.extend(std::iter::repeat_n("  ", depth));
    };
    while let Some(c) = chars.next() {
        if in_string {
            text.push(c);
            in_string = escaped || c != '"';
            escaped = !escaped && c == '\\';
            continue;
        }
        match c {
            '{' | '[' => {
                text.push(c);
                if let Some(close) = chars.next_if(|next| matches!(next, '}' | ']')) {
                    text.push(close);
                } else {
                    depth += 1;
                    new_line(&mut text, depth);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                new_line(&mut text, depth);
                text.push(c);
            }
            ',' => {
                text.push(c);
                new_line(&mut text, depth);
            }
            ':' => text.push_str(": "),
            _ => {
                in_string = c == '"';
                text.push(c);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    #[test]
    fn json_is_indented_as_a_local_command_prints_it() {
        for value in [
            json!({}),
            json!([]),
            json!(null),
            json!("a \"b\" \\ {[,:]} \\\\\" é"),
            json!({ "a": [], "b": {}, "c": [1, [2, -3.5e9], { "d": "x,y:\\" }], "e\\\"": null }),
            json!([[[]], [{}], "\\", "\"", "\\\"", true]),
        ] {
            let compact = value.to_string();
            assert_eq!(indented(&compact), serde_json::to_string_pretty(&value).unwrap());
        }
    }

    #[test]
    fn a_piece_comes_back_as_it_was() {
        let answer = serde_json::value::to_raw_value(&json!([1])).unwrap();
        let mut table = super::super::table(&["a", "b"], &[1]);
        table.add_row([super::super::verdict("x", true), super::super::Cell::new(7)]);
        let step = Step { unit: "bytes".to_owned(), total: None, done: 7, at: String::new() };
        let failure = Failure::usage("no");
        for piece in [
            Piece::Line("a\nb".to_owned()),
            Piece::Answer(answer),
            Piece::Table(table),
            Piece::Progress(step),
            Piece::End(End { status: 2, error: Some(failure) }),
        ] {
            let line = serde_json::to_string(&piece).unwrap();
            let again: Piece = serde_json::from_str(&line).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::to_string(&again).unwrap(), line);
        }
    }

    #[test]
    fn output_goes_to_the_caller_and_then_to_the_streams_again() {
        thread_local!(static SEEN: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) });
        let sink = |piece| {
            SEEN.with_borrow_mut(|seen| seen.push(serde_json::to_string(&piece).unwrap()));
        };
        let panicked = std::panic::catch_unwind(|| {
            to_caller(sink, || {
                super::super::line("one").unwrap();
                super::super::json(&json!({ "b": 1 })).unwrap();
                super::super::notice("two");
                assert!(send_file(b""));
                panic!("as a fault of a command");
            })
        });
        assert!(panicked.is_err() && !is_set() && !send_file(b"x"));
        let seen = SEEN.take();
        let expected =
            [r#"{"line":"one"}"#, r#"{"answer":{"b":1}}"#, r#"{"note":"two"}"#, r#"{"file":""}"#];
        assert_eq!(seen, expected);
    }
}

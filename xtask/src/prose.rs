//! Counts two habits of style in comments and documents that make a reader read a sentence twice:
//! noun clauses that begin with "what", and words that leave the actor unnamed.
//!
//! A few hits are legitimate, so the limits are rates and not zero.

use std::{fmt::Write as _, fs, ops::AddAssign, process::Command};

use crate::{Done, root};

/// Directories whose Rust files have their comments counted.
const SOURCES: [&str; 4] = ["src/", "cli/", "crates/", "xtask/"];

struct Habit {
    name: &'static str,
    /// The highest rate that passes, in hits per 10,000 words.
    limit: u64,
    /// Compares a word and the word before it. The word before is `None` unless only white space
    /// separates the two.
    matches: fn(before: Option<&str>, word: &str) -> bool,
}

const HABITS: [Habit; 2] = [
    Habit { name: "noun clauses with \"what\"", limit: 5, matches: noun_clause },
    Habit { name: "unnamed actors", limit: 1, matches: unnamed_actor },
];

fn noun_clause(before: Option<&str>, word: &str) -> bool {
    const VERBS: [&str; 18] = [
        "is", "was", "are", "were", "they", "it", "come", "comes", "came", "has", "had", "goes",
        "went", "follow", "follows", "lies", "stand", "stands",
    ];
    matches!(before, Some("what" | "What")) && VERBS.contains(&word)
}

fn unnamed_actor(_: Option<&str>, word: &str) -> bool {
    const WORDS: [&str; 6] = ["somebody", "nobody", "whoever", "whatever", "anew", "afresh"];
    let mut letters = word.chars();
    // Only the first letter may be a capital, as at the start of a sentence.
    let word: String =
        letters.next().map(|c| c.to_ascii_lowercase()).into_iter().chain(letters).collect();
    WORDS.contains(&word.as_str())
}

/// A line of prose.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    number: usize,
    text: String,
}

#[derive(Debug, PartialEq, Eq)]
struct Hit {
    habit: usize,
    /// Where the second word of the phrase is.
    line: usize,
    phrase: String,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Count {
    words: u64,
    hits: [u64; HABITS.len()],
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.words += other.words;
        self.hits.iter_mut().zip(other.hits).for_each(|(sum, hits)| *sum += hits);
    }
}

impl Count {
    fn of(lines: &[Line], hits: &[Hit]) -> Self {
        let is_word = |word: &&str| word.contains(char::is_alphanumeric);
        let words = lines
            .iter()
            .map(|line| line.text.split_whitespace().filter(is_word).count() as u64)
            .sum();
        let mut count = Self { words, ..Self::default() };
        hits.iter().for_each(|hit| count.hits[hit.habit] += 1);
        count
    }

    fn rate(&self, habit: usize) -> f64 {
        self.hits[habit] as f64 * 10_000.0 / self.words.max(1) as f64
    }

    /// The habits whose rate is above the limit.
    fn violations(&self) -> Vec<usize> {
        (0..HABITS.len())
            .filter(|habit| self.hits[*habit] * 10_000 > HABITS[*habit].limit * self.words)
            .collect()
    }
}

pub(crate) fn prose(args: &[String]) -> Done {
    let list = match args {
        [] => false,
        [arg] if arg == "--list" => true,
        _ => return Err("prose takes no argument but --list".to_owned()),
    };
    let (mut comments_count, mut documents_count) = (Count::default(), Count::default());
    for file in tracked()? {
        let is_source = file.ends_with(".rs") && SOURCES.iter().any(|dir| file.starts_with(dir));
        if !is_source && !file.ends_with(".md") {
            continue;
        }
        let path = root().join(&file);
        let text =
            fs::read_to_string(&path).map_err(|error| format!("cannot read {file}: {error}"))?;
        let lines = without_code(if is_source { comments(&text) } else { markdown(&text) });
        let hits = hits(&lines);
        if list {
            hits.iter().for_each(|hit| println!("{file}:{}: {}", hit.line, hit.phrase));
        }
        let area = if is_source { &mut comments_count } else { &mut documents_count };
        *area += Count::of(&lines, &hits);
    }
    let areas = [("comments", comments_count), ("documents", documents_count)];
    print!("{}", report(&areas));
    verdict(&areas)
}

/// The files that git tracks and that are present, relative to the root.
fn tracked() -> Result<Vec<String>, String> {
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root())
        .output()
        .map_err(|error| format!("cannot run `git ls-files`: {error}"))?;
    if !output.status.success() {
        return Err(format!("`git ls-files` failed: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let files = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(files.split('\0').filter(|file| root().join(file).is_file()).map(str::to_owned).collect())
}

fn report(areas: &[(&str, Count)]) -> String {
    let mut text = format!("{:<12} {:>8}", "area", "words");
    for habit in &HABITS {
        let _ = write!(text, "  {:>25} {:>10}", habit.name, "per 10,000");
    }
    for (area, count) in areas {
        let _ = write!(text, "\n{area:<12} {:>8}", count.words);
        for habit in 0..HABITS.len() {
            let _ = write!(text, "  {:>25} {:>10.1}", count.hits[habit], count.rate(habit));
        }
    }
    text + "\n"
}

fn verdict(areas: &[(&str, Count)]) -> Done {
    let mut problems = Vec::new();
    for (area, count) in areas {
        for habit in count.violations() {
            let Habit { name, limit, .. } = HABITS[habit];
            problems.push(format!(
                "{area}: {:.1} {name} per 10,000 words, where at most {limit} may be (--list shows them)",
                count.rate(habit)
            ));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
}

fn markdown(text: &str) -> Vec<Line> {
    text.lines()
        .enumerate()
        .map(|(at, line)| Line { number: at + 1, text: line.to_owned() })
        .collect()
}

/// Removes fenced code blocks. A fence that is not closed ends with its comment.
fn without_code(lines: Vec<Line>) -> Vec<Line> {
    let mut fence: Option<&str> = None;
    let mut last = 0;
    let mut prose = Vec::new();
    for line in lines {
        if line.number > last + 1 {
            fence = None;
        }
        last = line.number;
        let marker =
            ["```", "~~~"].into_iter().find(|marker| line.text.trim_start().starts_with(marker));
        match (fence, marker) {
            (None, None) => prose.push(line),
            (None, Some(_)) => fence = marker,
            (Some(open), Some(close)) if open == close => fence = None,
            (Some(_), _) => {}
        }
    }
    prose
}

/// Finds the habits. A phrase may continue on the next line: a line break does not hide it.
fn hits(lines: &[Line]) -> Vec<Hit> {
    let mut hits = Vec::new();
    let mut before: Option<&str> = None;
    let mut last = 0;
    for line in lines {
        if line.number > last + 1 {
            before = None;
        }
        last = line.number;
        let mut rest = line.text.as_str();
        while let Some(start) = rest.find(is_word_char) {
            if !rest[..start].trim().is_empty() {
                before = None;
            }
            let word = &rest[start..];
            let end = word.find(|c| !is_word_char(c)).unwrap_or(word.len());
            let (word, after) = word.split_at(end);
            for (habit, Habit { matches, .. }) in HABITS.iter().enumerate() {
                if matches(before, word) {
                    let phrase =
                        before.map_or_else(|| word.to_owned(), |before| format!("{before} {word}"));
                    hits.push(Hit { habit, line: line.number, phrase });
                }
            }
            (before, rest) = (Some(word), after);
        }
        if !rest.trim().is_empty() {
            before = None;
        }
    }
    hits
}

fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Extracts the comments of a Rust file, line by line and without their markers.
///
/// This is a scanner, not a parser: it knows the literals that can contain `//` or `/*`.
fn comments(source: &str) -> Vec<Line> {
    let mut found = Vec::new();
    let (mut at, mut number, mut after_word) = (0, 1, false);
    while let Some(c) = source[at..].chars().next() {
        let rest = &source[at..];
        let length = if rest.starts_with("//") {
            let length = rest.find('\n').unwrap_or(rest.len());
            let text = rest[2..length].trim_start_matches(['/', '!']).trim();
            found.push(Line { number, text: text.to_owned() });
            length
        } else if rest.starts_with("/*") {
            let length = block_comment(rest);
            let inner = rest[2..length].trim_end_matches("*/").trim_start_matches(['*', '!']);
            for (number, text) in (number..).zip(inner.lines()) {
                let text = text.trim().trim_start_matches('*').trim().to_owned();
                found.push(Line { number, text });
            }
            length
        } else if let Some(length) = (!after_word).then(|| raw_string(rest)).flatten() {
            length
        } else if c == '"' {
            quoted(rest, '"')
        } else if c == '\'' {
            char_or_lifetime(rest)
        } else {
            c.len_utf8()
        };
        after_word = is_word_char(c);
        number += rest[..length].matches('\n').count();
        at += length;
    }
    found
}

/// The length of the block comment, with those nested in it, that `text` starts with.
fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        if text.as_bytes()[at..].starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if text.as_bytes()[at..].starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

/// The length of the raw string literal that `text` starts with, if it starts with one.
fn raw_string(text: &str) -> Option<usize> {
    let after = text.strip_prefix(['b', 'c']).unwrap_or(text).strip_prefix('r')?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    let body = after[hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    let start = text.len() - body.len();
    Some(body.find(&close).map_or(text.len(), |end| start + end + close.len()))
}

/// The length of the literal between two `quote`s that `text` starts with.
fn quoted(text: &str, quote: char) -> usize {
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        if c == '\\' {
            chars.next();
        } else if c == quote {
            return at + c.len_utf8();
        }
    }
    text.len()
}

/// The length of a character literal, or 1 for the quote before a lifetime or a label.
fn char_or_lifetime(text: &str) -> usize {
    let mut chars = text.chars().skip(1);
    match (chars.next(), chars.next()) {
        (Some('\\'), _) | (Some(_), Some('\'')) => quoted(text, '\''),
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(source: &str) -> Vec<(usize, String)> {
        comments(source).into_iter().map(|line| (line.number, line.text)).collect()
    }

    fn count(lines: Vec<Line>) -> Count {
        let lines = without_code(lines);
        Count::of(&lines, &hits(&lines))
    }

    /// `filler` words, then the phrase.
    fn planted(filler: usize, phrase: &str) -> Count {
        count(markdown(&format!("{}{phrase}", "word ".repeat(filler))))
    }

    #[test]
    fn every_form_of_comment_is_extracted() {
        let source = "//! module\n\n/// item\nfn f() {} // trailing\n//// rule\n/* one\n * two */ let x = 1; /** doc */\n";
        let expected = [
            (1, "module"),
            (3, "item"),
            (4, "trailing"),
            (5, "rule"),
            (6, "one"),
            (7, "two"),
            (7, "doc"),
        ];
        assert_eq!(texts(source), expected.map(|(line, text)| (line, text.to_owned())));
    }

    #[test]
    fn block_comments_nest() {
        assert_eq!(
            texts("/* a /* b */ c */ d\n// e"),
            [(1, "a /* b */ c".to_owned()), (2, "e".to_owned())]
        );
        assert_eq!(texts("/* never /* closed */"), [(1, "never /* closed".to_owned())]);
    }

    #[test]
    fn literals_are_not_comments() {
        for source in [
            r#"let url = "https://example.com";"#,
            r#"let escaped = "a \" // b";"#,
            r#"let backslash = "\\"; let next = "/* x";"#,
            r##"let raw = r"\"; let next = "// x";"##,
            r###"let raw = r#"a " // b"#;"###,
            r###"let raw = br##"a "# // b"##;"###,
            r#"let bytes = b"// x"; let c = c"// x";"#,
            r#"let quote = '"'; let next = "// x";"#,
            r#"let quote = '\''; let next = "// x";"#,
            r#"let escape = '\u{22}'; let next = "// x";"#,
            "let lines = \"first\n// second\";",
        ] {
            assert_eq!(texts(source), [], "{source}");
            // The scanner is outside the literal again.
            assert_eq!(texts(&format!("{source} // end")).len(), 1, "{source}");
        }
    }

    #[test]
    fn quotes_that_open_no_literal_hide_no_comment() {
        for source in [
            "fn f<'a>(x: &'a str) {} // end",
            "'outer: loop {} // end",
            "let r#type = 1; // end",
            "let for_r = \"x\"; // end",
            "let é = 'é'; // end",
            "/* \" */ // end",
            "// it's\n// end",
        ] {
            assert_eq!(
                texts(source).last().map(|(_, text)| text.as_str()),
                Some("end"),
                "{source}"
            );
        }
    }

    #[test]
    fn every_listed_phrase_is_a_hit() {
        for verb in "is was are were they it come comes came has had goes went follow follows lies stand stands"
            .split_whitespace()
        {
            assert_eq!(planted(3, &format!("what {verb}.")).hits, [1, 0], "{verb}");
            assert_eq!(planted(0, &format!("What {verb}")).hits, [1, 0], "{verb}");
        }
        for word in ["somebody", "Nobody", "whoever", "Whatever", "anew", "Afresh", "somebody's"] {
            assert_eq!(planted(3, word).hits, [0, 1], "{word}");
        }
    }

    #[test]
    fn other_phrases_are_no_hits() {
        for phrase in [
            "what isn't",
            "somewhat is",
            "what, is",
            "(what) is",
            "what_is",
            "that is",
            "renew",
            "nobody_1",
        ] {
            assert_eq!(planted(3, phrase).hits, [0, 0], "{phrase}");
        }
    }

    #[test]
    fn a_line_break_hides_no_hit_but_code_between_does() {
        let found = hits(&comments("// This says what\n// is wrong.\n"));
        assert_eq!(found, [Hit { habit: 0, line: 2, phrase: "what is".to_owned() }]);
        assert_eq!(hits(&comments("// This says what\nlet x = 1;\n// is wrong.\n")), []);
    }

    #[test]
    fn fenced_code_is_not_prose() {
        let text = "one\n```rust\nwhat is ~~~ nobody\n~~~\n```\ntwo\n~~~\nwhat was\n~~~\n";
        assert_eq!(count(markdown(text)), Count { words: 2, hits: [0, 0] });
        // An open fence ends with its comment.
        let source = "/// one\n/// ```\n/// what is\nfn f() {}\n/// nobody\n";
        assert_eq!(count(comments(source)), Count { words: 2, hits: [0, 1] });
    }

    #[test]
    fn rates_above_the_limits_fail() {
        // 10,000 words with exactly as many hits as may be: 5 phrases of two words, one word.
        let phrases = "what is ".repeat(5) + "nobody";
        let at_limit = planted(10_000 - 11, &phrases);
        assert_eq!(at_limit, Count { words: 10_000, hits: [5, 1] });
        assert_eq!(verdict(&[("comments", at_limit), ("documents", Count::default())]), Ok(()));

        let clauses = planted(9_988, &"what is ".repeat(6));
        let actors = planted(9_998, "nobody anew");
        assert_eq!((clauses.violations(), actors.violations()), (vec![0], vec![1]));
        for area in ["comments", "documents"] {
            for count in [clauses, actors] {
                let error = verdict(&[("other", at_limit), (area, count)]).unwrap_err();
                assert!(error.starts_with(area), "{error}");
            }
        }
    }

    #[test]
    fn the_report_states_counts_and_rates() {
        let report = report(&[("comments", Count { words: 20_000, hits: [3, 0] })]);
        let row: Vec<_> = report.lines().nth(1).unwrap_or_default().split_whitespace().collect();
        assert_eq!(row, ["comments", "20000", "3", "1.5", "0", "0.0"]);
    }
}

//! The query language: words and phrases with AND, OR and NOT over the raw text of logs.

use envelog::group::Log;

use super::needle::Needle;
use crate::error::{ApiError, Result};

/// The most words of a query.
const WORDS_MAX: usize = 64;
/// The deepest nesting of a query.
const DEPTH_MAX: usize = 32;
/// Characters with a meaning in the real service that this one does not know.
const RESERVED: &[char] = &['|', ':', '*', '?', '<', '>', '=', '[', ']', '{', '}'];

/// A query.
#[derive(Debug)]
pub(crate) enum Expression {
    All,
    Text(Box<Needle>),
    Not(Box<Self>),
    And(Vec<Self>),
    Or(Vec<Self>),
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Open,
    Close,
    And,
    Or,
    Not,
    Text(String),
}

impl Expression {
    /// # Errors
    /// 400 for anything but words and phrases with AND, OR, NOT and parentheses, or `*`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        if matches!(text.trim(), "" | "*") {
            return Ok(Self::All);
        }
        let tokens = tokens(text)?;
        if tokens.iter().filter(|token| matches!(token, Token::Text(_))).count() > WORDS_MAX {
            return Err(refused(&format!("it has more than {WORDS_MAX} words")));
        }
        let mut parser = Parser { tokens: &tokens, depth: 0 };
        let expression = parser.or()?;
        match parser.tokens {
            [] => Ok(expression),
            _ => Err(refused("a parenthesis is not opened")),
        }
    }

    /// Whether a log matches: a word is found in a value, in any case of its ASCII letters.
    pub(crate) fn matches(&self, log: &Log) -> bool {
        match self {
            Self::All => true,
            Self::Text(text) => log.contents.iter().any(|content| text.is_in(&content.value)),
            Self::Not(inner) => !inner.matches(log),
            Self::And(all) => all.iter().all(|it| it.matches(log)),
            Self::Or(any) => any.iter().any(|it| it.matches(log)),
        }
    }

    /// Whether a log that matches may be in these encoded groups. If not, they need no decoding.
    pub(crate) fn may_match(&self, encoded: &[u8]) -> bool {
        match self {
            Self::All | Self::Not(_) => true,
            Self::Text(text) => text.is_in(encoded),
            Self::And(all) => all.iter().all(|it| it.may_match(encoded)),
            Self::Or(any) => any.iter().any(|it| it.may_match(encoded)),
        }
    }
}

fn refused(why: &str) -> ApiError {
    ApiError::parameter(format!(
        "the query is refused: {why}; this service searches for words and \"phrases\" with AND, OR, \
         NOT and parentheses in the text of logs, or for * alone"
    ))
}

fn tokens(text: &str) -> Result<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let token = match first {
            '(' | ')' => {
                rest = &rest[1..];
                if first == '(' { Token::Open } else { Token::Close }
            }
            '"' => {
                let (phrase, after) = phrase(&rest[1..])?;
                rest = after;
                Token::Text(phrase)
            }
            _ => {
                let end = rest.find(|c: char| c.is_whitespace() || "()\"".contains(c));
                let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
                rest = after;
                word_token(word)?
            }
        };
        tokens.push(token);
        rest = rest.trim_start();
    }
    Ok(tokens)
}

fn word_token(word: &str) -> Result<Token> {
    if let Some(reserved) = word.chars().find(|c| RESERVED.contains(c)) {
        return Err(refused(&format!("{reserved} has no meaning here; put it into a phrase")));
    }
    Ok(match word.to_ascii_lowercase().as_str() {
        "and" => Token::And,
        "or" => Token::Or,
        "not" => Token::Not,
        lower => Token::Text(lower.to_owned()),
    })
}

/// The phrase up to the closing quote, and the rest behind it. A backslash escapes the next
/// character.
fn phrase(text: &str) -> Result<(String, &str)> {
    let mut phrase = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' if phrase.is_empty() => return Err(refused("a phrase is empty")),
            '"' => return Ok((phrase.to_ascii_lowercase(), &text[at + 1..])),
            '\\' => phrase.extend(chars.next().map(|(_, c)| c)),
            c => phrase.push(c),
        }
    }
    Err(refused("a phrase has no end"))
}

struct Parser<'a> {
    tokens: &'a [Token],
    depth: usize,
}

impl Parser<'_> {
    fn next_is(&mut self, token: &Token) -> bool {
        let is = self.tokens.first() == Some(token);
        if is {
            self.tokens = &self.tokens[1..];
        }
        is
    }

    fn or(&mut self) -> Result<Expression> {
        let mut any = vec![self.and()?];
        while self.next_is(&Token::Or) {
            any.push(self.and()?);
        }
        Ok(if any.len() == 1 { any.remove(0) } else { Expression::Or(any) })
    }

    /// Two expressions behind each other are joined by AND.
    fn and(&mut self) -> Result<Expression> {
        let mut all = vec![self.not()?];
        loop {
            let joined = self.next_is(&Token::And);
            match self.tokens.first() {
                Some(Token::Text(_) | Token::Open | Token::Not) => all.push(self.not()?),
                _ if joined => return Err(refused("a word is missing behind AND")),
                _ => break,
            }
        }
        Ok(if all.len() == 1 { all.remove(0) } else { Expression::And(all) })
    }

    fn not(&mut self) -> Result<Expression> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(refused("it is nested too deeply"));
        }
        let expression = if self.next_is(&Token::Not) {
            Expression::Not(Box::new(self.not()?))
        } else if self.next_is(&Token::Open) {
            let inner = self.or()?;
            if !self.next_is(&Token::Close) {
                return Err(refused("a parenthesis is not closed"));
            }
            inner
        } else if let Some((Token::Text(text), rest)) = self.tokens.split_first() {
            self.tokens = rest;
            let needle = Needle::new(text).map_err(|error| refused(&error.to_string()))?;
            Expression::Text(Box::new(needle))
        } else {
            return Err(refused("a word is missing"));
        };
        self.depth -= 1;
        Ok(expression)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use envelog::{LogGroup, group::Content};
    use proptest::prelude::*;

    use super::*;

    fn matches(query: &str, values: &[&str]) -> bool {
        let content = |value: &&str| Content::new("k", value.as_bytes().to_vec());
        let log = Log { contents: values.iter().map(content).collect(), ..Log::default() };
        let expression = Expression::parse(query).unwrap();
        let matches = expression.matches(&log);
        // Encoded groups are skipped only if no log of theirs matches.
        let encoded = LogGroup { logs: vec![log], ..LogGroup::default() }.encode_to_bytes();
        assert!(expression.may_match(&encoded) || !matches, "{query}");
        matches
    }

    #[test]
    fn words_and_phrases() {
        let log = ["GET /orders 200", "took 5 ms"];
        for (query, expected) in [
            ("", true),
            (" * ", true),
            ("get", true),
            ("GET", true),
            ("get took", true),
            ("get AND NOT took", false),
            ("post OR took", true),
            ("post or put", false),
            ("not post", true),
            ("\"orders 200\"", true),
            ("\"200 took\"", false),
            ("(post or get) and (5 or 6)", true),
            ("not (get or put)", false),
            ("put or get and 6", false),
            ("\"a:b\"", false),
        ] {
            assert_eq!(matches(query, &log), expected, "{query}");
        }
    }

    #[test]
    fn groups_without_the_words_are_not_decoded() {
        for (query, expected) in [
            ("shipped", false),
            ("PAID", true),
            ("paid and shipped", false),
            ("paid or shipped", true),
            ("not shipped", true),
            ("*", true),
        ] {
            let expression = Expression::parse(query).unwrap();
            assert_eq!(expression.may_match(b"\x0a order 17 paid"), expected, "{query}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for query in [
            "level: info",
            "* | select 1",
            "a*",
            "(a",
            "a)",
            "a and",
            "or",
            "not",
            "\"a",
            "\"\"",
            "a > 5",
            "()",
            &"(".repeat(100),
            &"not ".repeat(100),
            &"a ".repeat(65),
        ] {
            assert_eq!(Expression::parse(query).unwrap_err().code, "ParameterInvalid", "{query}");
        }
    }

    proptest! {
        #[test]
        fn no_query_is_too_strange(query in "[ a-c\"()\\\\é*|]{0,40}|( ?(and|or|not|a|\\(|\\)))*") {
            if let Ok(expression) = Expression::parse(&query) {
                expression.matches(&Log::default());
            }
        }
    }
}

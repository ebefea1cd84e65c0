//! The search for a text in any case of its ASCII letters, in raw bytes.

use aho_corasick::{AhoCorasick, BuildError};
use memchr::arch::all::packedpair::Pair;

/// The length of the part of a text that is looked for first, in bytes. It has at most 16 forms by
/// the case of its letters, which the vector instructions of most processors find at once.
const PART: usize = 4;

/// A text to find.
#[derive(Debug)]
pub(crate) struct Needle {
    lower: Vec<u8>,
    /// The forms of a part of the text.
    part: AhoCorasick,
    /// The position of that part in the text.
    at: usize,
}

impl Needle {
    /// # Errors
    /// If the search library refuses the text, which has no reason to.
    pub(crate) fn new(text: &str) -> Result<Self, BuildError> {
        let lower = text.to_ascii_lowercase().into_bytes();
        // The byte that is rarest in most texts makes the fewest false hits.
        let rarest = Pair::new(&lower).map_or(0, |pair| usize::from(pair.index1()));
        let at = rarest.min(lower.len().saturating_sub(PART));
        let end = lower.len().min(at + PART);
        let part = AhoCorasick::new(forms(&lower[at..end]))?;
        Ok(Self { lower, part, at })
    }

    /// Whether the text is in these bytes.
    pub(crate) fn is_in(&self, bytes: &[u8]) -> bool {
        let mut from = self.at;
        while let Some(rest) = bytes.get(from..)
            && let Some(hit) = self.part.find(rest)
        {
            let start = from + hit.start() - self.at;
            let found = bytes.get(start..start + self.lower.len());
            if found.is_some_and(|found| found.eq_ignore_ascii_case(&self.lower)) {
                return true;
            }
            from += hit.start() + 1;
        }
        false
    }
}

/// The text in each case of its letters.
fn forms(lower: &[u8]) -> Vec<Vec<u8>> {
    lower.iter().fold(vec![Vec::new()], |forms, byte| {
        let mut cases = vec![*byte, byte.to_ascii_uppercase()];
        cases.dedup();
        let longer = |form: &Vec<u8>| {
            let form = form.clone();
            cases.iter().map(move |case| [&form[..], &[*case]].concat()).collect::<Vec<_>>()
        };
        forms.iter().flat_map(longer).collect()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_part_that_overlaps_itself_hides_nothing() {
        assert!(Needle::new("aaaab").unwrap().is_in(b"xaAaAaAaab"));
        assert!(!Needle::new("aaaab").unwrap().is_in(b"xaAaAaAaaa"));
        assert!(!Needle::new("order").unwrap().is_in(b"orde"));
        assert!(Needle::new("\u{e9}t\u{e9}").unwrap().is_in("L'\u{e9}T\u{e9}".as_bytes()));
    }

    proptest! {
        #[test]
        fn it_finds_what_a_plain_search_finds(text in "[abAB1é]{1,7}", bytes in "[abAB1é]{0,40}") {
            let plain = bytes.to_ascii_lowercase().contains(&text.to_ascii_lowercase());
            prop_assert_eq!(Needle::new(&text).unwrap().is_in(bytes.as_bytes()), plain);
        }
    }
}

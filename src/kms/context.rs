//! The encryption context: the names and values to which a wrapped key is bound.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The context to which a wrapped key is bound: names and values, in the order of the names. It is
/// not secret. A KMS may write it to its audit log.
///
/// A KMS that takes a context of names and values gets it as it is. As JSON it is one object of
/// strings. A KMS that takes associated data (AAD) in their place gets
/// [`EncryptionContext::to_bytes`].
///
/// ```
/// use envelog::kms::EncryptionContext;
///
/// let context = EncryptionContext::from([("envelog:store".to_owned(), "7f3a".to_owned())]);
/// assert_eq!(context.get("envelog:store"), Some("7f3a"));
/// assert_eq!(context.iter().count(), 1);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EncryptionContext(BTreeMap<String, String>);

impl EncryptionContext {
    /// A context without entries.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The value of a name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The names and their values, in the order of the names (that of their UTF-8 bytes).
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no entries.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The context as associated data, for a KMS that authenticates bytes and not names and values.
    ///
    /// ```text
    /// 4  the number of entries
    /// for each entry, in the order of the names:
    ///    4  the length of the name, n
    ///    n  the name, in UTF-8
    ///    4  the length of the value, m
    ///    m  the value, in UTF-8
    /// ```
    ///
    /// All numbers are unsigned and little-endian. Two contexts have the same bytes only if they
    /// are equal. The bytes of the context without entries are four zeros, so the associated data
    /// are never empty.
    ///
    /// **This encoding is part of the format of the wrapped keys** of every backend that uses it
    /// (the embedded KMS, PKCS#11, Vault): it never changes, because then no stored key would open
    /// again. A backend uses it as it is, so that the same context has the same bytes everywhere.
    ///
    /// Names and values are shorter than 4 GiB; the engine's have a few hundred bytes.
    ///
    /// ```
    /// use envelog::kms::EncryptionContext;
    ///
    /// let context = EncryptionContext::from([("a".to_owned(), "bc".to_owned())]);
    /// assert_eq!(context.to_bytes(), b"\x01\0\0\0\x01\0\0\0a\x02\0\0\0bc");
    /// ```
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        fn put_len(out: &mut Vec<u8>, len: usize) {
            out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        }
        let mut out = Vec::new();
        put_len(&mut out, self.0.len());
        for text in self.0.iter().flat_map(|(name, value)| [name, value]) {
            put_len(&mut out, text.len());
            out.extend_from_slice(text.as_bytes());
        }
        out
    }
}

impl<const N: usize> From<[(String, String); N]> for EncryptionContext {
    fn from(entries: [(String, String); N]) -> Self {
        Self(entries.into())
    }
}

/// Of two entries with the same name, the later one is kept.
impl FromIterator<(String, String)> for EncryptionContext {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(entries: I) -> Self {
        Self(entries.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeSet;

    use super::*;

    fn context(entries: &[(&str, &str)]) -> EncryptionContext {
        entries.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// These bytes are in stored wrapped keys, so they must stay the same.
    #[test]
    fn the_bytes_are_those_of_the_format() {
        assert_eq!(context(&[]).to_bytes(), [0; 4]);
        let bytes = context(&[("envelog:suite", "AES"), ("b", ""), ("b", "é")]).to_bytes();
        let wanted = [
            &b"\x02\0\0\0"[..],
            b"\x01\0\0\0b\x02\0\0\0\xc3\xa9",
            b"\x0d\0\0\0envelog:suite\x03\0\0\0AES",
        ];
        assert_eq!(bytes, wanted.concat());
    }

    #[test]
    fn different_contexts_have_different_bytes() {
        let contexts = [
            context(&[]),
            context(&[("", "")]),
            context(&[("ab", "c")]),
            context(&[("a", "bc")]),
            context(&[("a", "b"), ("c", "")]),
            context(&[("a", "b"), ("c", "d")]),
            context(&[("a", "b\u{1}\0\0\0c\u{1}\0\0\0d")]),
            context(&[("a", "d"), ("c", "b")]),
        ];
        let bytes: BTreeSet<_> = contexts.iter().map(EncryptionContext::to_bytes).collect();
        assert_eq!(bytes.len(), contexts.len());
    }

    #[test]
    fn it_is_a_json_object_of_strings() {
        let context = context(&[("b", "2"), ("a", "1")]);
        let json = serde_json::to_string(&context).unwrap();
        assert_eq!(json, r#"{"a":"1","b":"2"}"#);
        assert_eq!(serde_json::from_str::<EncryptionContext>(&json).unwrap(), context);
        assert_eq!(context.get("b"), Some("2"));
        assert_eq!(context.get("c"), None);
        assert_eq!((context.len(), context.is_empty()), (2, false));
    }
}

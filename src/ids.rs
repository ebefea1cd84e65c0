//! Identifiers, and the hexadecimal form for them and other short byte strings.

use std::{fmt, io, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::io::Random;

/// The error for a string that is not an identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an identifier is 32 lower-case hexadecimal digits")]
pub struct ParseIdError;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        ///
        /// Sixteen random bytes, printed, parsed and serialized as 32 lower-case hexadecimal
        /// digits.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// The identifier that consists of these bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// Its bytes.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }

            /// A new random identifier.
            ///
            /// # Errors
            /// The error of the source of randomness.
            pub fn random(random: &dyn Random) -> io::Result<Self> {
                let mut bytes = [0; 16];
                random.fill(&mut bytes)?;
                Ok(Self(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex_encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let bytes = hex_decode(text).and_then(|bytes| bytes.try_into().ok());
                bytes.map(Self).ok_or(ParseIdError)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

id! {
    /// Identifies a store.
    StoreId
}

id! {
    /// Identifies a Logstore, across all stores and for ever. A Logstore that is deleted and
    /// created again under its old name gets another identifier.
    LogstoreId
}

id! {
    /// Identifies a service keyring. A store records the identifier of the keyring that was created
    /// with it.
    KeyringId
}

id! {
    /// Identifies a segment.
    SegmentId
}

/// Lower-case hexadecimal digits, two for each byte.
pub(crate) fn hex_encode(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// The bytes that [`hex_encode`] encoded as `text`. `None` for any other text, such as one with
/// upper-case digits.
pub(crate) fn hex_decode(text: &str) -> Option<Vec<u8>> {
    let nibble = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    // Allocated at its full length: a vector that grows would leave copies of a key behind.
    let mut bytes = Vec::with_capacity(pairs.len());
    for &[high, low] in pairs {
        bytes.push(nibble(high)? << 4 | nibble(low)?);
    }
    Some(bytes)
}

/// For `#[serde(with = "crate::ids::hex")]`: a `Vec<u8>` or a byte array as a string of lower-case
/// hexadecimal digits.
pub(crate) mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(crate) fn serialize<S: Serializer>(
        bytes: &impl AsRef<[u8]>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::hex_encode(bytes.as_ref()))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: TryFrom<Vec<u8>>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        let bytes = super::hex_decode(&String::deserialize(deserializer)?)
            .ok_or_else(|| de::Error::custom("not lower-case hexadecimal digits"))?;
        bytes.try_into().map_err(|_| de::Error::custom("wrong number of hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::io::OsRandom;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Sample {
        id: StoreId,
        #[serde(with = "hex")]
        array: [u8; 4],
        #[serde(with = "hex")]
        bytes: Vec<u8>,
    }

    #[test]
    fn printed_form() {
        let id = SegmentId::from_bytes(
            *b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\xfe\xff",
        );
        assert_eq!(id.to_string(), "000102030405060708090a0b0c0dfeff");
        assert_eq!(format!("{id:?}"), "SegmentId(000102030405060708090a0b0c0dfeff)");
        assert_eq!(id.to_string().parse(), Ok(id));
        for wrong in [
            "",
            "00",
            "000102030405060708090A0B0C0DFEFF",
            "000102030405060708090a0b0c0dfeff00",
            "é",
        ] {
            assert_eq!(wrong.parse::<SegmentId>(), Err(ParseIdError), "{wrong}");
        }
        assert_eq!("0001020304050607 8090a0b0c0dfeff0".parse::<SegmentId>(), Err(ParseIdError));
    }

    #[test]
    fn random_ids_differ() {
        assert_ne!(LogstoreId::random(&OsRandom).unwrap(), LogstoreId::random(&OsRandom).unwrap());
    }

    #[test]
    fn json_form() {
        let sample =
            Sample { id: StoreId::from_bytes([0xab; 16]), array: [1, 2, 3, 4], bytes: vec![0xff] };
        let json = r#"{"id":"abababababababababababababababab","array":"01020304","bytes":"ff"}"#;
        assert_eq!(serde_json::to_string(&sample).unwrap(), json);
        assert_eq!(serde_json::from_str::<Sample>(json).unwrap(), sample);
        for wrong in
            [json.replace("01020304", "010203"), json.replace("ff", "fF"), json.replace("abab", "")]
        {
            serde_json::from_str::<Sample>(&wrong).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn hex_round_trip(bytes: Vec<u8>) {
            prop_assert_eq!(hex_decode(&hex_encode(&bytes)), Some(bytes));
        }

        #[test]
        fn hex_is_canonical(text in "[0-9a-fA-F]{0,40}") {
            if let Some(bytes) = hex_decode(&text) {
                prop_assert_eq!(hex_encode(&bytes), text);
            }
        }
    }
}

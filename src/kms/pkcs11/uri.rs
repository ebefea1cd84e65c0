//! The `pkcs11:` URI (RFC 7512), which names the token and the way to log in.

use std::{env::consts, fmt, path::PathBuf};

use cryptoki::{context::Info, slot::TokenInfo};
use zeroize::Zeroizing;

use crate::kms::KmsUrlError;

/// A token, and the module and PIN for it.
#[derive(Debug)]
pub(super) struct Uri {
    pub(super) region: String,
    /// The argument for the dynamic linker: an absolute path, or a file name that it looks for.
    pub(super) module: PathBuf,
    pub(super) pin: Pin,
    /// The slot to search. `None` searches all slots.
    pub(super) slot_id: Option<u64>,
    /// Fields that the token's description must match.
    token: Vec<(TokenField, String)>,
    /// Fields that the module's description must match.
    library: Vec<(LibraryField, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenField {
    Label,
    Manufacturer,
    Model,
    Serial,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LibraryField {
    Description,
    Manufacturer,
    Version,
}

/// The PIN of the token's user.
pub(super) enum Pin {
    /// No PIN: the token needs none, or asks for it in its own way.
    None,
    Value(Zeroizing<String>),
    /// Read at each login.
    File(PathBuf),
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Value(_) => f.write_str("Value(..)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

impl Uri {
    /// Parses a URI. An error names attributes, but quotes no value.
    pub(super) fn parse(uri: &str) -> Result<Self, KmsUrlError> {
        let rest = uri
            .strip_prefix("pkcs11:")
            .ok_or_else(|| malformed("it does not begin with \"pkcs11:\""))?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (mut token, mut library, mut slot_id) = (Vec::new(), Vec::new(), None);
        let mut path = Attributes::parse(path, ';')?;
        for (name, field) in [
            ("token", TokenField::Label),
            ("manufacturer", TokenField::Manufacturer),
            ("model", TokenField::Model),
            ("serial", TokenField::Serial),
        ] {
            token.extend(path.take(name).map(|value| (field, value.to_string())));
        }
        for (name, field) in [
            ("library-description", LibraryField::Description),
            ("library-manufacturer", LibraryField::Manufacturer),
            ("library-version", LibraryField::Version),
        ] {
            library.extend(path.take(name).map(|value| (field, value.to_string())));
        }
        if let Some(value) = path.take("slot-id") {
            slot_id =
                Some(value.parse().map_err(|_| malformed("slot-id is not a decimal number"))?);
        }
        path.end()?;
        let mut query = Attributes::parse(query, '&')?;
        let region = query.take("region").filter(|region| !region.is_empty());
        let region = region
            .ok_or_else(|| malformed("region=… has to name the region that it serves"))?
            .to_string();
        let pin = match (query.take("pin-value"), query.take("pin-source")) {
            (None, None) => Pin::None,
            (Some(value), None) => Pin::Value(value),
            (None, Some(source)) => Pin::File(pin_file(&source)?),
            (Some(_), Some(_)) => {
                return Err(malformed("pin-value and pin-source exclude each other"));
            }
        };
        let module = module(query.take("module-path"), query.take("module-name"))?;
        query.end()?;
        Ok(Self { region, module, pin, slot_id, token, library })
    }

    /// Whether the token matches.
    pub(super) fn matches(&self, info: &TokenInfo) -> bool {
        self.token.iter().all(|(field, wanted)| {
            wanted
                == match field {
                    TokenField::Label => info.label(),
                    TokenField::Manufacturer => info.manufacturer_id(),
                    TokenField::Model => info.model(),
                    TokenField::Serial => info.serial_number(),
                }
        })
    }

    /// Whether the URI has fields for the module.
    pub(super) fn asks_for_library(&self) -> bool {
        !self.library.is_empty()
    }

    /// Whether the module matches.
    pub(super) fn matches_library(&self, info: &Info) -> bool {
        self.library.iter().all(|(field, wanted)| match field {
            LibraryField::Description => wanted == info.library_description(),
            LibraryField::Manufacturer => wanted == info.manufacturer_id(),
            LibraryField::Version => {
                let version = info.library_version();
                *wanted == format!("{}.{}", version.major(), version.minor())
            }
        })
    }
}

/// Names and decoded values. Each one is taken out once.
struct Attributes<'a>(Vec<(&'a str, Zeroizing<String>)>);

impl<'a> Attributes<'a> {
    fn parse(text: &'a str, separator: char) -> Result<Self, KmsUrlError> {
        let mut all: Vec<(&str, Zeroizing<String>)> = Vec::new();
        for attribute in text.split(separator).filter(|attribute| !attribute.is_empty()) {
            let (name, value) = attribute
                .split_once('=')
                .ok_or_else(|| malformed("a part of it is not \"name=value\""))?;
            if all.iter().any(|(other, _)| *other == name) {
                return Err(malformed(&format!("{} is there twice", shown(name))));
            }
            let value = decoded(value).ok_or_else(|| {
                malformed(&format!(
                    "{} is not percent-encoded UTF-8 without zero bytes",
                    shown(name)
                ))
            })?;
            all.push((name, value));
        }
        Ok(Self(all))
    }

    fn take(&mut self, name: &str) -> Option<Zeroizing<String>> {
        let at = self.0.iter().position(|(other, _)| *other == name)?;
        Some(self.0.swap_remove(at).1)
    }

    /// Fails if an attribute is left over. Ignoring it could select another token.
    fn end(self) -> Result<(), KmsUrlError> {
        match self.0.first() {
            None => Ok(()),
            Some((name @ ("object" | "type" | "id"), _)) => {
                Err(malformed(&format!("{name} names a key, which is for cmk_key_id to do")))
            }
            Some((name, _)) => {
                Err(malformed(&format!("{} is not an attribute that is known here", shown(name))))
            }
        }
    }
}

/// A name that is safe to show. A malformed name may be a secret that the operator put in the wrong
/// place.
fn shown(name: &str) -> &str {
    let is_name =
        name.len() <= 32 && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    if is_name { name } else { "an attribute" }
}

fn malformed(what: &str) -> KmsUrlError {
    KmsUrlError::Malformed(what.to_owned())
}

/// Decodes percent-encoding. `None` for invalid encoding, for text that is not UTF-8, and for text
/// with a zero byte.
fn decoded(text: &str) -> Option<Zeroizing<String>> {
    // The result is never longer than the text, so no reallocation leaves a copy behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                u8::try_from(digit()? << 4 | digit()?).ok()?
            }
            byte => byte,
        });
    }
    if bytes.contains(&0) {
        return None;
    }
    let text = std::str::from_utf8(&bytes).ok()?;
    Some(Zeroizing::new(text.to_owned()))
}

/// `file:/a/path`, `file:///a/path` or `/a/path`.
fn pin_file(source: &str) -> Result<PathBuf, KmsUrlError> {
    let path = source.strip_prefix("file:").unwrap_or(source);
    let path = path.strip_prefix("//").unwrap_or(path);
    if !path.starts_with('/') {
        return Err(malformed("pin-source is not \"file:\" and an absolute path"));
    }
    Ok(path.into())
}

/// The module to load: a file; a name for the dynamic linker to find; or a directory and a name.
fn module(
    path: Option<Zeroizing<String>>,
    name: Option<Zeroizing<String>>,
) -> Result<PathBuf, KmsUrlError> {
    if path.as_ref().is_some_and(|path| !path.starts_with('/')) {
        return Err(malformed("module-path is not an absolute path"));
    }
    if name.as_ref().is_some_and(|name| name.is_empty() || name.contains('/')) {
        return Err(malformed("module-name is not the name of a module"));
    }
    let file = name.map(|name| format!("{}{}{}", consts::DLL_PREFIX, *name, consts::DLL_SUFFIX));
    match (path, file) {
        (None, None) => {
            Err(malformed("module-path or module-name has to say which module to load"))
        }
        (None, Some(file)) => Ok(file.into()),
        (Some(path), None) => Ok(path.as_str().into()),
        (Some(path), Some(file)) => Ok(PathBuf::from(path.as_str()).join(file)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const SHORTEST: &str = "pkcs11:?region=r&module-path=/lib/p11.so";

    #[test]
    fn every_attribute_has_its_place() {
        let uri = Uri::parse(
            "pkcs11:token=The%20token;manufacturer=Snake%20Oil,%20Inc.;model=1.0;serial=DECC0401;slot-id=327;\
             library-description=P11;library-manufacturer=Oil;library-version=3.1\
             ?region=cn-hangzhou&pin-source=file:/etc/token%2Fpin&module-path=/usr/lib&module-name=softhsm2",
        )
        .unwrap();
        assert_eq!((uri.region.as_str(), uri.slot_id), ("cn-hangzhou", Some(327)));
        assert_eq!(
            uri.token,
            [
                (TokenField::Label, "The token".to_owned()),
                (TokenField::Manufacturer, "Snake Oil, Inc.".to_owned()),
                (TokenField::Model, "1.0".to_owned()),
                (TokenField::Serial, "DECC0401".to_owned()),
            ]
        );
        assert_eq!(
            uri.library,
            [
                (LibraryField::Description, "P11".to_owned()),
                (LibraryField::Manufacturer, "Oil".to_owned()),
                (LibraryField::Version, "3.1".to_owned()),
            ]
        );
        assert!(
            matches!(&uri.pin, Pin::File(path) if path.to_str() == Some("/etc/token/pin")),
            "{uri:?}"
        );
        assert!(uri.module.to_str().unwrap().starts_with("/usr/lib/libsofthsm2."), "{uri:?}");
        assert!(matches!(Uri::parse(SHORTEST).unwrap(), Uri { pin: Pin::None, slot_id: None, .. }));
        let named = Uri::parse("pkcs11:?module-name=p11&region=r").unwrap();
        assert_eq!(named.module.components().count(), 1, "{named:?}");
        for source in ["file:/p", "file:///p", "/p"] {
            let uri = Uri::parse(&format!("{SHORTEST}&pin-source={source}")).unwrap();
            assert!(matches!(&uri.pin, Pin::File(path) if path.to_str() == Some("/p")), "{source}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_named_and_never_quoted() {
        for (uri, words) in [
            ("pkcs11:", "region"),
            ("pkcs11:?region=&module-path=/m", "region"),
            ("pkcs11:?region=r", "module-path"),
            ("pkcs11:?region=r&module-path=secret.so", "module-path"),
            ("pkcs11:?region=r&module-name=../secret", "module-name"),
            ("pkcs11:token=a;token=secret?region=r&module-path=/m", "token is there twice"),
            ("pkcs11:object=secret?region=r&module-path=/m", "cmk_key_id"),
            ("pkcs11:tokn=secret?region=r&module-path=/m", "tokn"),
            ("pkcs11:slot-id=secret?region=r&module-path=/m", "slot-id"),
            ("pkcs11:token=%5?region=r&module-path=/m", "token"),
            ("pkcs11:token=%FF?region=r&module-path=/m", "token"),
            ("pkcs11:?region=r&module-path=/m&pin-value=secret%00", "pin-value"),
            ("pkcs11:?region=r&module-path=/m&pin-value=secret&pin-source=file:/p", "exclude"),
            ("pkcs11:?region=r&module-path=/m&pin-source=|secret", "pin-source"),
            ("pkcs11:?region=r&module-path=/m&secret-1234", "name=value"),
            ("pkcs11:?region=r&module-path=/m&secret1234=", "an attribute"),
        ] {
            let error = Uri::parse(uri).unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains("secret"), "{uri}: {error}");
        }
    }

    #[test]
    fn debug_shows_no_pin() {
        let uri = Uri::parse(&format!("{SHORTEST}&pin-value=1%32%334-secret")).unwrap();
        assert!(matches!(&uri.pin, Pin::Value(pin) if pin.as_str() == "1234-secret"));
        assert!(!format!("{uri:?}").contains("secret"));
    }
}

//! Secrets in errors, in `Debug` output and in wrapped keys.

use base64::{
    Engine,
    prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD},
};

use crate::{
    ids::hex_encode,
    kms::KmsError,
    sync::lock,
    testing::conformance::run::{Check, Run, failed},
};

/// The longest detail of an error, in bytes.
const DETAIL_BYTES_MAX: usize = 1000;
/// The length of the parts of a key that are looked for, in bytes. A multiple of 3, so that their
/// base64 is a part of the key's.
const PART_BYTES: usize = 9;

pub(in crate::testing::conformance) fn error_details(run: &Run<'_>) -> Check {
    for error in &lock(&run.heard).errors {
        let (KmsError::Revoked { detail, .. }
        | KmsError::Unreachable { detail }
        | KmsError::Invalid { detail }) = error;
        if detail.trim().is_empty() {
            return failed(format!("an error has no detail: {error:?}"));
        }
        if detail.len() > DETAIL_BYTES_MAX || detail.contains(['\n', '\r', '\0']) {
            return failed(format!("a detail is no short clause: {detail:.200?}"));
        }
    }
    Ok(())
}

pub(in crate::testing::conformance) fn no_secret_shown(run: &Run<'_>) -> Check {
    let secrets = run.subject.secrets();
    let heard = lock(&run.heard);
    let texts = heard.errors.iter().map(|error| format!("{error} {error:?}").into_bytes());
    let shown: Vec<u8> = texts.chain(heard.shown.iter().cloned()).collect::<Vec<_>>().join(&b'\n');
    for key in &heard.keys {
        for part in key.chunks_exact(PART_BYTES) {
            if forms(part).iter().any(|form| contains(&shown, form)) {
                return failed("a part of a data key is in an error, Debug output or wrapped key");
            }
        }
    }
    for secret in secrets {
        if !secret.is_empty() && contains(&shown, secret.as_bytes()) {
            return failed("a secret of the login is in an error, Debug output or wrapped key");
        }
    }
    Ok(())
}

/// The bytes in the forms in which they could be written.
fn forms(part: &[u8]) -> Vec<Vec<u8>> {
    let hex = hex_encode(part);
    let list = format!("{part:?}");
    let texts = [
        hex.to_uppercase(),
        hex,
        BASE64_STANDARD_NO_PAD.encode(part),
        BASE64_URL_SAFE_NO_PAD.encode(part),
        list.trim_matches(['[', ']']).to_owned(),
        String::from_utf8_lossy(part).into_owned(),
    ];
    // Invalid UTF-8 becomes the same replacement character for all bytes.
    let texts = texts.into_iter().filter(|text| !text.contains(char::REPLACEMENT_CHARACTER));
    texts.map(String::into_bytes).chain([part.to_vec()]).collect()
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    memchr::memmem::find(text, part).is_some()
}

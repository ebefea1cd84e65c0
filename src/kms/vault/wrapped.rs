//! The bytes of wrapped keys: `vault:vVERSION:BASE64`, as Transit returns them.

/// The longest accepted wrapped key. That of a data key has about 90 bytes.
const WRAPPED_BYTES_MAX: usize = 4096;
/// The most digits of a version.
const VERSION_DIGITS_MAX: usize = 10;

/// The version of the key that wrapped this, if the bytes have the form of a wrapped key.
pub(super) fn version(wrapped: &[u8]) -> Option<&str> {
    if wrapped.len() > WRAPPED_BYTES_MAX {
        return None;
    }
    let rest = str::from_utf8(wrapped).ok()?.strip_prefix("vault:v")?;
    let (version, ciphertext) = rest.split_once(':')?;
    let is_number = version.bytes().all(|byte| byte.is_ascii_digit());
    let is_version = (1..=VERSION_DIGITS_MAX).contains(&version.len()) && !version.starts_with('0');
    // The server's decoder ignores line breaks. Here they are damage.
    let base64 = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte);
    let is_ciphertext = !ciphertext.is_empty() && ciphertext.bytes().all(base64);
    (is_number && is_version && is_ciphertext).then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_in_the_prefix() {
        assert_eq!(version(b"vault:v1:AAAA"), Some("1"));
        assert_eq!(version(b"vault:v1234567890:+/=="), Some("1234567890"));
        for none in [
            &b""[..],
            b"vault",
            b"vault:v1",
            b"vault:v1:",
            b"vault:v:AAAA",
            b"vault:v0:AAAA",
            b"vault:v01:AAAA",
            b"vault:v-1:AAAA",
            b"vault:v+1:AAAA",
            b"vault:v12345678901:AAAA",
            b"vault:v1:AA\nAA",
            b"vault:v1:AA:AA",
            b"vault:v1:\xff",
            b" vault:v1:AAAA",
            b"Vault:v1:AAAA",
            &[b"vault:v1:".as_slice(), &[b'A'; 4096]].concat(),
        ] {
            assert_eq!(version(none), None, "{:?}", String::from_utf8_lossy(none));
        }
    }
}

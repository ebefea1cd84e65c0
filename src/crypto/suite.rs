//! The list of suites.

use super::{Cipher, HashAlg};

/// The cryptographic protection of a segment: a cipher, the hash for its keys and digests, and
/// whether blocks are encrypted or only authenticated. The number is stored on disk and never
/// reused.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug)]
#[repr(u16)]
#[non_exhaustive]
pub enum Suite {
    /// 1: AES-256-GCM (NIST SP 800-38D) with HKDF-SHA-256 and SHA-256.
    Aes256Gcm = 1,
    /// 2: SM4-GCM (RFC 8998) with HKDF-SM3 and SM3.
    Sm4Gcm = 2,
    /// 3: the integrity-only form of 1: GMAC, with the block as associated data.
    Aes256Gmac = 3,
    /// 4: the integrity-only form of 2.
    Sm4Gmac = 4,
}

impl Suite {
    /// Every suite, in the order of their numbers.
    pub const ALL: [Suite; 4] =
        [Suite::Aes256Gcm, Suite::Sm4Gcm, Suite::Aes256Gmac, Suite::Sm4Gmac];

    /// The number on disk.
    #[must_use]
    pub fn code(self) -> u16 {
        self as u16
    }

    /// The suite with that number, if there is one.
    #[must_use]
    pub fn from_code(code: u16) -> Option<Suite> {
        Self::ALL.into_iter().find(|suite| suite.code() == code)
    }

    /// The cipher. The integrity-only suites use it without plaintext.
    #[must_use]
    pub fn cipher(self) -> Cipher {
        match self.encrypting() {
            Suite::Sm4Gcm => Cipher::Sm4Gcm,
            _ => Cipher::Aes256Gcm,
        }
    }

    /// The hash for its key derivation, header hash and digests.
    #[must_use]
    pub fn hash(self) -> HashAlg {
        match self.cipher() {
            Cipher::Aes256Gcm => HashAlg::Sha256,
            Cipher::Sm4Gcm => HashAlg::Sm3,
        }
    }

    /// Whether blocks are encrypted. Otherwise they are only authenticated.
    #[must_use]
    pub fn encrypts(self) -> bool {
        self == self.encrypting()
    }

    /// The integrity-only form.
    #[must_use]
    pub fn integrity_only(self) -> Suite {
        match self {
            Suite::Aes256Gcm | Suite::Aes256Gmac => Suite::Aes256Gmac,
            Suite::Sm4Gcm | Suite::Sm4Gmac => Suite::Sm4Gmac,
        }
    }

    /// The encrypting form.
    #[must_use]
    pub fn encrypting(self) -> Suite {
        match self {
            Suite::Aes256Gcm | Suite::Aes256Gmac => Suite::Aes256Gcm,
            Suite::Sm4Gcm | Suite::Sm4Gmac => Suite::Sm4Gcm,
        }
    }

    /// The name, such as `AES-256-GCM`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Suite::Aes256Gcm => "AES-256-GCM",
            Suite::Sm4Gcm => "SM4-GCM",
            Suite::Aes256Gmac => "AES-256-GMAC",
            Suite::Sm4Gmac => "SM4-GMAC",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_fixed() {
        assert_eq!(Suite::ALL.map(Suite::code), [1, 2, 3, 4]);
        assert_eq!(Suite::ALL.map(|suite| Suite::from_code(suite.code())), Suite::ALL.map(Some));
        for unknown in [0, 5, 0x0100, u16::MAX] {
            assert_eq!(Suite::from_code(unknown), None);
        }
    }

    #[test]
    fn each_suite_is_what_its_name_says() {
        use Suite::{Aes256Gcm, Aes256Gmac, Sm4Gcm, Sm4Gmac};
        assert_eq!(
            Suite::ALL.map(Suite::name),
            ["AES-256-GCM", "SM4-GCM", "AES-256-GMAC", "SM4-GMAC"]
        );
        assert_eq!(Suite::ALL.map(Suite::encrypts), [true, true, false, false]);
        assert_eq!(
            Suite::ALL.map(Suite::integrity_only),
            [Aes256Gmac, Sm4Gmac, Aes256Gmac, Sm4Gmac]
        );
        assert_eq!(Suite::ALL.map(Suite::encrypting), [Aes256Gcm, Sm4Gcm, Aes256Gcm, Sm4Gcm]);
        assert_eq!(
            Suite::ALL.map(Suite::cipher),
            [Cipher::Aes256Gcm, Cipher::Sm4Gcm, Cipher::Aes256Gcm, Cipher::Sm4Gcm]
        );
        assert_eq!(
            Suite::ALL.map(Suite::hash),
            [HashAlg::Sha256, HashAlg::Sm3, HashAlg::Sha256, HashAlg::Sm3]
        );
        assert_eq!(Suite::ALL.map(|suite| suite.cipher().key_len()), [32, 16, 32, 16]);
    }
}

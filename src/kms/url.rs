//! KMS backends by URL, as a command line or a configuration file names them.

use std::sync::Arc;

use super::Kms;

/// The reason why a URL names no KMS.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KmsUrlError {
    /// This build has no backend for the scheme.
    #[error("no KMS backend for \"{scheme}:\" is built in; there is {built_in}")]
    Unsupported {
        /// The part before the colon, or the whole URL if it has no colon.
        scheme: String,
        /// The schemes of this build.
        built_in: String,
    },
    /// The backend cannot parse the URL. The detail quotes no value, as some values are secrets.
    #[error("not a KMS URL: {0}")]
    Malformed(String),
}

/// Creates the backend that a URL names. It calls no KMS, so a KMS that is down can be named too.
///
/// | URL | backend | feature |
/// |---|---|---|
/// | `aliyun-kms://REGION` | `AliyunKms` in that region, such as `cn-hangzhou`; `?endpoint=URL&sts-endpoint=URL` for other endpoints than the public ones | `kms-aliyun` |
/// | `local:DIR` | `LocalKms`, in that directory | `kms-local` |
/// | `aws-kms://REGION?…` | `AwsKms`, whose `from_url` lists the parameters | `kms-aws` |
/// | `vault:https://HOST?region=REGION&auth=…` | `VaultKms`, whose `from_url` lists the parameters | `kms-vault` |
/// | `pkcs11:…?region=…` | `Pkcs11Kms`, in a token that the rest of the URL chooses (RFC 7512) | `kms-pkcs11` |
///
/// ```
/// # #[cfg(feature = "kms-local")] {
/// let kms = envelog::kms::from_url("local:/var/lib/kms")?;
/// assert_eq!(kms.name(), "local");
/// # }
/// # Ok::<_, envelog::kms::KmsUrlError>(())
/// ```
///
/// # Errors
/// [`KmsUrlError`].
pub fn from_url(url: &str) -> Result<Arc<dyn Kms>, KmsUrlError> {
    let (scheme, rest) = url.split_once(':').unwrap_or((url, ""));
    match scheme {
        #[cfg(feature = "kms-aliyun")]
        "aliyun-kms" => Ok(Arc::new(super::AliyunKms::from_url(rest)?)),
        #[cfg(feature = "kms-local")]
        "local" if rest.is_empty() => {
            Err(KmsUrlError::Malformed("local: names no directory".to_owned()))
        }
        #[cfg(feature = "kms-local")]
        "local" => Ok(Arc::new(super::LocalKms::at(rest))),
        #[cfg(feature = "kms-pkcs11")]
        "pkcs11" => Ok(Arc::new(super::pkcs11::Pkcs11Kms::from_uri(url)?)),
        #[cfg(feature = "kms-aws")]
        "aws-kms" => Ok(Arc::new(super::AwsKms::from_url(url)?)),
        #[cfg(feature = "kms-vault")]
        "vault" => Ok(Arc::new(super::VaultKms::from_url(url)?)),
        _ => {
            let _ = rest;
            let built_in = [
                cfg!(feature = "kms-aliyun").then_some("aliyun-kms://REGION"),
                cfg!(feature = "kms-aws").then_some("aws-kms://REGION"),
                cfg!(feature = "kms-local").then_some("local:DIR"),
                cfg!(feature = "kms-pkcs11").then_some("pkcs11:…?region=…"),
                cfg!(feature = "kms-vault").then_some("vault:https://HOST?region=REGION&auth=…"),
            ];
            let built_in: Vec<_> = built_in.into_iter().flatten().collect();
            let built_in =
                if built_in.is_empty() { "none".to_owned() } else { built_in.join(", ") };
            Err(KmsUrlError::Unsupported { scheme: scheme.to_owned(), built_in })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scheme_picks_the_backend() {
        let error = from_url("ftp://host").unwrap_err();
        assert!(
            matches!(&error, KmsUrlError::Unsupported { scheme, .. } if scheme == "ftp"),
            "{error}"
        );
        #[cfg(feature = "kms-aliyun")]
        {
            let name =
                |url| from_url(url).map(|kms| (kms.name().to_owned(), kms.serves("cn-hangzhou")));
            let served = Ok(("aliyun".to_owned(), true));
            assert_eq!(name("aliyun-kms://cn-hangzhou"), served);
            assert_eq!(
                name("aliyun-kms://cn-hangzhou?endpoint=https://kms-vpc.cn-hangzhou.aliyuncs.com"),
                served
            );
            assert_eq!(
                name(
                    "aliyun-kms://cn-hangzhou/?sts-endpoint=http%3A%2F%2F127.0.0.1%3A1&endpoint=http://[::1]:2"
                ),
                served
            );
            assert_eq!(name("aliyun-kms://eu-central-1"), Ok(("aliyun".to_owned(), false)));
            for url in [
                "aliyun-kms:",
                "aliyun-kms:cn-hangzhou",
                "aliyun-kms://",
                "aliyun-kms://evil.example/",
                "aliyun-kms://cn-hangzhou?endpoint=",
                "aliyun-kms://cn-hangzhou?endpoint=http://kms.cn-hangzhou.aliyuncs.com",
                "aliyun-kms://cn-hangzhou?access-key-secret=hidden",
            ] {
                let error = from_url(url).unwrap_err();
                assert!(matches!(error, KmsUrlError::Malformed(_)), "{url}: {error}");
                assert!(!error.to_string().contains("hidden"), "{error}");
            }
        }
        #[cfg(feature = "kms-local")]
        {
            assert_eq!(
                from_url("local:/some/where").map(|kms| kms.name().to_owned()),
                Ok("local".to_owned())
            );
            assert!(matches!(from_url("local:"), Err(KmsUrlError::Malformed(_))));
        }
        #[cfg(feature = "kms-aws")]
        {
            assert_eq!(
                from_url("aws-kms://eu-west-1").map(|kms| kms.name().to_owned()),
                Ok("aws-kms".to_owned())
            );
            assert!(matches!(from_url("aws-kms:"), Err(KmsUrlError::Malformed(_))));
        }
        #[cfg(feature = "kms-vault")]
        {
            assert_eq!(
                from_url("vault:https://vault.example?region=r&auth=kubernetes")
                    .map(|kms| (kms.name().to_owned(), kms.serves("r"))),
                Ok(("vault".to_owned(), true))
            );
            assert!(matches!(from_url("vault:"), Err(KmsUrlError::Malformed(_))));
        }
    }
}

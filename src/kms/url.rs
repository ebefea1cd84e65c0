//! KMSs by their URL, as a command line or a configuration file names them.

use std::sync::Arc;

use super::Kms;

/// Why a URL names no KMS.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KmsUrlError {
    /// No backend of that scheme is built in.
    #[error("no KMS backend for \"{scheme}:\" is built in; there is {built_in}")]
    Unsupported {
        /// The part before the colon, or all of what has none.
        scheme: String,
        /// The schemes that are.
        built_in: String,
    },
    /// The backend makes no sense of it. The detail quotes no value, as some are secrets.
    #[error("not a KMS URL: {0}")]
    Malformed(String),
}

/// Makes the backend that a URL names. Calls nobody: a KMS that is down can be named all the same.
///
/// | URL | backend | feature |
/// |---|---|---|
/// | `local:DIR` | [`LocalKms`](super::LocalKms), in that directory | `kms-local` |
/// | `aws-kms://REGION?…` | [`AwsKms`](super::AwsKms), which [takes parameters](super::AwsKms::from_url) | `kms-aws` |
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
        #[cfg(feature = "kms-local")]
        "local" if rest.is_empty() => Err(KmsUrlError::Malformed("local: names no directory".to_owned())),
        #[cfg(feature = "kms-local")]
        "local" => Ok(Arc::new(super::LocalKms::at(rest))),
        #[cfg(feature = "kms-aws")]
        "aws-kms" => Ok(Arc::new(super::AwsKms::from_url(url)?)),
        _ => {
            let _ = rest;
            let built_in = [
                cfg!(feature = "kms-local").then_some("local:DIR"),
                cfg!(feature = "kms-aws").then_some("aws-kms://REGION"),
            ];
            let built_in: Vec<_> = built_in.into_iter().flatten().collect();
            let built_in = if built_in.is_empty() { "none".to_owned() } else { built_in.join(", ") };
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
        assert!(matches!(&error, KmsUrlError::Unsupported { scheme, .. } if scheme == "ftp"), "{error}");
        #[cfg(feature = "kms-local")]
        {
            assert_eq!(from_url("local:/some/where").map(|kms| kms.name().to_owned()), Ok("local".to_owned()));
            assert!(matches!(from_url("local:"), Err(KmsUrlError::Malformed(_))));
        }
        #[cfg(feature = "kms-aws")]
        {
            assert_eq!(from_url("aws-kms://eu-west-1").map(|kms| kms.name().to_owned()), Ok("aws-kms".to_owned()));
            assert!(matches!(from_url("aws-kms:"), Err(KmsUrlError::Malformed(_))));
        }
    }
}

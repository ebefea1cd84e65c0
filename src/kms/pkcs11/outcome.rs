//! Sorts return values of a module into the four answers.

use cryptoki::{
    context::Function,
    error::{Error, RvError},
};

use crate::kms::{KmsError, RevokedReason};

/// `CKR_AEAD_DECRYPT_FAILED` of PKCS#11 3.0. The library has no name for it yet.
const CKR_AEAD_DECRYPT_FAILED: u64 = 0x35;

/// Sorts a failed call by its return value alone.
pub(super) fn outcome(error: &Error) -> KmsError {
    let Error::Pkcs11(code, _) = error else {
        return match error {
            Error::LibraryLoading(_) => {
                KmsError::unreachable(format!("the module cannot be loaded: {error}"))
            }
            _ => KmsError::invalid(format!("the module is not usable: {error}")),
        };
    };
    let detail = said(error);
    match code {
        RvError::KeyFunctionNotPermitted => {
            KmsError::Revoked { reason: RevokedReason::Disabled, detail }
        }
        RvError::EncryptedDataInvalid
        | RvError::EncryptedDataLenRange
        | RvError::DataInvalid
        | RvError::DataLenRange
        | RvError::KeyTypeInconsistent
        | RvError::KeySizeRange
        | RvError::MechanismInvalid
        | RvError::MechanismParamInvalid
        | RvError::FunctionNotSupported
        | RvError::ArgumentsBad
        | RvError::BufferTooSmall
        | RvError::AttributeTypeInvalid => KmsError::invalid(detail),
        RvError::UnknownErrorCode(code) if is_aead_failure(*code) => KmsError::invalid(detail),
        _ => KmsError::unreachable(detail),
    }
}

fn is_aead_failure(code: impl TryInto<u64>) -> bool {
    code.try_into().is_ok_and(|code| code == CKR_AEAD_DECRYPT_FAILED)
}

/// Whether `C_Decrypt` itself failed with an unspecific value. Some tokens (SoftHSM among them)
/// return one for a wrong tag.
pub(super) fn may_be_a_wrong_tag(error: &Error) -> bool {
    matches!(
        error,
        Error::Pkcs11(RvError::GeneralError | RvError::FunctionFailed, Function::Decrypt)
    )
}

/// Whether the module is not initialized, or another part of the process has finalized it.
pub(super) fn is_not_initialized(error: &Error) -> bool {
    matches!(error, Error::Pkcs11(RvError::CryptokiNotInitialized, _))
}

pub(super) fn is_initialized_already(error: &Error) -> bool {
    matches!(error, Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _))
}

/// Whether the token counts this as an attempt with a wrong PIN, or would.
pub(super) fn is_wrong_pin(error: &Error) -> bool {
    matches!(
        error,
        Error::Pkcs11(RvError::PinIncorrect | RvError::PinInvalid | RvError::PinLenRange, _)
    )
}

pub(super) fn is_logged_in_already(error: &Error) -> bool {
    matches!(error, Error::Pkcs11(RvError::UserAlreadyLoggedIn, _))
}

/// The function and its return value, by their names in the standard. The library's own message is
/// a paragraph.
pub(super) fn said(error: &Error) -> String {
    let Error::Pkcs11(code, function) = error else { return error.to_string() };
    let name = match code {
        RvError::VendorDefined(code) | RvError::UnknownErrorCode(code) => format!("{code:#x}"),
        code => {
            let mut name = "CKR".to_owned();
            for letter in format!("{code:?}").chars() {
                if letter.is_ascii_uppercase() {
                    name.push('_');
                }
                name.push(letter.to_ascii_uppercase());
            }
            name
        }
    };
    format!("C_{function:?} returned {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    enum Kind {
        Disabled,
        Unreachable,
        Invalid,
    }
    use Kind::{Disabled, Invalid, Unreachable};

    /// Checks the table in the module's documentation, line by line.
    #[test]
    fn every_return_value_is_sorted() {
        use RvError as R;
        let table = [
            (Disabled, vec![R::KeyFunctionNotPermitted]),
            (
                Invalid,
                vec![
                    R::EncryptedDataInvalid,
                    R::EncryptedDataLenRange,
                    R::UnknownErrorCode(0x35),
                    R::DataInvalid,
                    R::DataLenRange,
                    R::KeyTypeInconsistent,
                    R::KeySizeRange,
                    R::MechanismInvalid,
                    R::MechanismParamInvalid,
                    R::FunctionNotSupported,
                    R::ArgumentsBad,
                    R::BufferTooSmall,
                    R::AttributeTypeInvalid,
                ],
            ),
            (
                Unreachable,
                vec![
                    R::TokenNotPresent,
                    R::TokenNotRecognized,
                    R::SlotIdInvalid,
                    R::DeviceRemoved,
                    R::DeviceError,
                    R::DeviceMemory,
                    R::HostMemory,
                    R::GeneralError,
                    R::FunctionFailed,
                    R::FunctionCanceled,
                    R::FunctionRejected,
                    R::CryptokiNotInitialized,
                    R::CantLock,
                    R::SessionHandleInvalid,
                    R::SessionClosed,
                    R::SessionCount,
                    R::UserNotLoggedIn,
                    R::UserAnotherAlreadyLoggedIn,
                    R::UserTooManyTypes,
                    R::UserPinNotInitialized,
                    R::PinIncorrect,
                    R::PinInvalid,
                    R::PinLenRange,
                    R::PinExpired,
                    R::PinLocked,
                    R::KeyHandleInvalid,
                    R::ObjectHandleInvalid,
                    R::OperationActive,
                    R::OperationNotInitialized,
                    R::UnknownErrorCode(0x7777),
                    R::VendorDefined(0x8000_0001),
                ],
            ),
        ];
        for (wanted, codes) in table {
            for code in codes {
                let error = Error::Pkcs11(code, Function::DecryptInit);
                let found = match outcome(&error) {
                    KmsError::Revoked { reason: RevokedReason::Disabled, .. } => Disabled,
                    KmsError::Unreachable { .. } => Unreachable,
                    KmsError::Invalid { .. } => Invalid,
                    other @ KmsError::Revoked { .. } => panic!("{code:?}: {other}"),
                };
                assert_eq!(found, wanted, "{code:?}");
            }
        }
    }

    #[test]
    fn calls_and_return_values_have_the_names_of_the_standard() {
        for (code, function, words) in [
            (RvError::PinIncorrect, Function::Login, "C_Login returned CKR_PIN_INCORRECT"),
            (
                RvError::KeyFunctionNotPermitted,
                Function::DecryptInit,
                "C_DecryptInit returned CKR_KEY_FUNCTION_NOT_PERMITTED",
            ),
            (
                RvError::VendorDefined(0x8000_0001),
                Function::Decrypt,
                "C_Decrypt returned 0x80000001",
            ),
        ] {
            assert_eq!(said(&Error::Pkcs11(code, function)), words);
        }
    }
}

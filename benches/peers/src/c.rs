//! libgcrypt and OpenSSL, through the few functions of their C interfaces that this program uses.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr,
};

use crate::{AAD, Contender, NONCE};

type GcryHandle = *mut c_void;

// gcrypt.h
const GCRY_CIPHER_AES256: c_int = 9;
const GCRY_CIPHER_SM4: c_int = 318;
const GCRY_CIPHER_MODE_GCM: c_int = 9;

#[link(name = "gcrypt")]
unsafe extern "C" {
    fn gcry_check_version(required: *const c_char) -> *const c_char;
    fn gcry_cipher_open(
        handle: *mut GcryHandle,
        algorithm: c_int,
        mode: c_int,
        flags: c_uint,
    ) -> c_uint;
    fn gcry_cipher_close(handle: GcryHandle);
    fn gcry_cipher_setkey(handle: GcryHandle, key: *const c_void, len: usize) -> c_uint;
    fn gcry_cipher_setiv(handle: GcryHandle, iv: *const c_void, len: usize) -> c_uint;
    fn gcry_cipher_authenticate(handle: GcryHandle, aad: *const c_void, len: usize) -> c_uint;
    fn gcry_cipher_encrypt(
        handle: GcryHandle,
        out: *mut c_void,
        out_len: usize,
        input: *const c_void,
        len: usize,
    ) -> c_uint;
    fn gcry_cipher_decrypt(
        handle: GcryHandle,
        out: *mut c_void,
        out_len: usize,
        input: *const c_void,
        len: usize,
    ) -> c_uint;
    fn gcry_cipher_gettag(handle: GcryHandle, tag: *mut c_void, len: usize) -> c_uint;
    fn gcry_cipher_checktag(handle: GcryHandle, tag: *const c_void, len: usize) -> c_uint;
}

#[link(name = "crypto")]
unsafe extern "C" {
    fn OpenSSL_version(what: c_int) -> *const c_char;
    fn EVP_CIPHER_CTX_new() -> *mut c_void;
    fn EVP_sm4_ctr() -> *const c_void;
    fn EVP_EncryptInit_ex(
        context: *mut c_void,
        cipher: *const c_void,
        engine: *mut c_void,
        key: *const u8,
        iv: *const u8,
    ) -> c_int;
    fn EVP_EncryptUpdate(
        context: *mut c_void,
        out: *mut u8,
        out_len: *mut c_int,
        input: *const u8,
        len: c_int,
    ) -> c_int;
}

pub(crate) fn gcrypt_version() -> String {
    // SAFETY: initializes the library and returns a static string.
    unsafe { CStr::from_ptr(gcry_check_version(ptr::null())) }.to_string_lossy().into_owned()
}

pub(crate) fn openssl_version() -> String {
    // SAFETY: returns a static string.
    unsafe { CStr::from_ptr(OpenSSL_version(0)) }.to_string_lossy().into_owned()
}

pub(crate) enum Algorithm {
    Aes256,
    Sm4,
}

struct Gcrypt(GcryHandle);

impl Gcrypt {
    fn new(algorithm: &Algorithm, key: &[u8]) -> Self {
        gcrypt_version();
        let algorithm = match algorithm {
            Algorithm::Aes256 => GCRY_CIPHER_AES256,
            Algorithm::Sm4 => GCRY_CIPHER_SM4,
        };
        let mut handle = ptr::null_mut();
        // SAFETY: the handle is written before it is used, and the key has `len` bytes.
        unsafe {
            assert_eq!(gcry_cipher_open(&mut handle, algorithm, GCRY_CIPHER_MODE_GCM, 0), 0);
            assert_eq!(gcry_cipher_setkey(handle, key.as_ptr().cast(), key.len()), 0);
        }
        Self(handle)
    }

    /// Begins a message.
    fn begin(&self) {
        // SAFETY: a live handle, and arrays of the lengths given.
        unsafe {
            assert_eq!(gcry_cipher_setiv(self.0, NONCE.as_ptr().cast(), NONCE.len()), 0);
            assert_eq!(gcry_cipher_authenticate(self.0, AAD.as_ptr().cast(), AAD.len()), 0);
        }
    }
}

impl Drop for Gcrypt {
    fn drop(&mut self) {
        // SAFETY: opened by `new`, and closed once.
        unsafe { gcry_cipher_close(self.0) };
    }
}

pub(crate) fn gcrypt(algorithm: Algorithm, key: &[u8]) -> Contender {
    let (sealer, opener) = (Gcrypt::new(&algorithm, key), Gcrypt::new(&algorithm, key));
    Contender::new(
        "libgcrypt",
        move |data| {
            let mut tag = [0; 16];
            sealer.begin();
            // SAFETY: a live handle; without an input the buffer is encrypted in place.
            unsafe {
                assert_eq!(
                    gcry_cipher_encrypt(
                        sealer.0,
                        data.as_mut_ptr().cast(),
                        data.len(),
                        ptr::null(),
                        0
                    ),
                    0
                );
                assert_eq!(gcry_cipher_gettag(sealer.0, tag.as_mut_ptr().cast(), tag.len()), 0);
            }
            tag
        },
        move |data, tag, out| {
            opener.begin();
            // SAFETY: a live handle, and buffers of the lengths given.
            unsafe {
                let (input, output) = (data.as_ptr().cast(), out.as_mut_ptr().cast());
                assert_eq!(gcry_cipher_decrypt(opener.0, output, out.len(), input, data.len()), 0);
                assert_eq!(gcry_cipher_checktag(opener.0, tag.as_ptr().cast(), tag.len()), 0);
            }
        },
    )
}

/// SM4-CTR of OpenSSL. The tag is zero, and opening is not supported.
pub(crate) fn openssl_ctr(key: &[u8; 16]) -> Contender {
    // SAFETY: a new context, which lives until the program ends. The key has the cipher's length.
    let context = unsafe {
        let context = EVP_CIPHER_CTX_new();
        assert!(!context.is_null());
        assert_eq!(
            EVP_EncryptInit_ex(
                context,
                EVP_sm4_ctr(),
                ptr::null_mut(),
                key.as_ptr(),
                [0; 16].as_ptr()
            ),
            1
        );
        context
    };
    Contender::new(
        "OpenSSL",
        move |data| {
            let mut written = 0;
            let len = c_int::try_from(data.len()).expect("fits");
            // SAFETY: a live context, and a buffer that is encrypted in place.
            unsafe {
                let bytes = data.as_mut_ptr();
                assert_eq!(
                    EVP_EncryptInit_ex(
                        context,
                        ptr::null(),
                        ptr::null_mut(),
                        ptr::null(),
                        [0; 16].as_ptr()
                    ),
                    1
                );
                assert_eq!(EVP_EncryptUpdate(context, bytes, &mut written, bytes, len), 1);
            }
            assert_eq!(written, len);
            [0; 16]
        },
        |_, _, _| unreachable!("a counter mode is not opened"),
    )
}

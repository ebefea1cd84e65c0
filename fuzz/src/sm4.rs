//! SM4 of `sm4-simd`, on every backend that this processor supports, against the crates of
//! RustCrypto.

use aes_gcm::{
    AesGcm,
    aead::{AeadInOut, KeyInit, consts::U12, inout::InOutBuf},
};
use arbitrary::{Arbitrary, Unstructured};
use ctr::{
    Ctr32BE,
    cipher::{KeyIvInit, StreamCipher},
};
use sm4_simd::{
    Backend, Sm4, Sm4Gcm,
    cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt},
};

#[derive(Arbitrary)]
struct Case<'a> {
    key: [u8; 16],
    nonce: [u8; 12],
    counter: u32,
    /// The offsets of input and output in their buffers.
    at: [u8; 2],
    /// The bit to flip before opening: in the tag, then in the message, then in the associated
    /// data.
    flipped: u16,
    /// The length of the message, which repeats its text.
    len: u16,
    aad: &'a [u8],
    text: &'a [u8],
}

pub fn sm4(data: &[u8]) {
    let Ok(case) = Case::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let len = usize::from(case.len) % 20_000;
    let plain: Vec<u8> = case
        .text
        .iter()
        .chain(&[0])
        .zip(0u8..)
        .cycle()
        .map(|(byte, n)| byte ^ n)
        .take(len)
        .collect();
    let theirs = AesGcm::<::sm4::Sm4, U12>::new(&case.key.into());
    let nonce = case.nonce.into();
    let mut sealed = plain.clone();
    let tag = theirs
        .encrypt_inout_detached(&nonce, case.aad, (&mut sealed[..]).into())
        .expect("short enough");

    let mut iv = [0; 16];
    iv[..12].copy_from_slice(&case.nonce);
    iv[12..].copy_from_slice(&case.counter.to_be_bytes());
    let mut streamed = plain.clone();
    Ctr32BE::<::sm4::Sm4>::new(&case.key.into(), &iv.into()).apply_keystream(&mut streamed);
    let (blocks, _) = plain.as_chunks::<16>();
    let blocks: Vec<Array<u8, _>> = blocks.iter().map(|block| Array(*block)).collect();
    let mut encrypted = blocks.clone();
    ::sm4::Sm4::new(&case.key.into()).encrypt_blocks(&mut encrypted);

    let [at, out_at] = case.at.map(|at| usize::from(at % 64));
    for backend in Backend::ALL.into_iter().filter(|backend| backend.is_available()) {
        let ours = Sm4::with_backend(&case.key.into(), backend).expect("available");
        let mut input = vec![0xa5; at];
        input.extend_from_slice(&plain);
        ours.ctr32(&case.nonce, case.counter, (&mut input[at..]).into());
        assert_eq!(input[at..], streamed, "{backend}: CTR in place");
        let mut output = vec![0x5a; out_at + len + 64];
        let in_out =
            InOutBuf::new(&input[at..], &mut output[out_at..out_at + len]).expect("of one length");
        ours.ctr32(&case.nonce, case.counter, in_out);
        assert_eq!(
            output[out_at..out_at + len],
            plain,
            "{backend}: CTR from one buffer to another"
        );
        let around = output[..out_at].iter().chain(&output[out_at + len..]);
        assert!(
            around.into_iter().all(|&byte| byte == 0x5a),
            "{backend}: wrote outside of the buffer"
        );

        let mut some = blocks.clone();
        ours.encrypt_blocks(&mut some);
        assert_eq!(some, encrypted, "{backend}: blocks");
        ours.decrypt_blocks(&mut some);
        assert_eq!(some, blocks, "{backend}: blocks back");

        for multiplier in Sm4Gcm::multipliers() {
            let what = format!("{backend}, {multiplier}");
            let ours =
                Sm4Gcm::with_backend(&case.key.into(), backend, multiplier).expect("available");
            let mut buffer = vec![0xa5; at];
            buffer.extend_from_slice(&plain);
            let made = ours
                .encrypt_inout_detached(&nonce, case.aad, (&mut buffer[at..]).into())
                .expect("short enough");
            assert_eq!((&buffer[at..], made), (&sealed[..], tag), "{what}: sealing in place");

            let part = &mut output[out_at..out_at + len];
            part.fill(0x77);
            let in_out = InOutBuf::new(&buffer[at..], part).expect("of one length");
            ours.decrypt_inout_detached(&nonce, case.aad, in_out, &tag).expect("authentic");
            assert_eq!(
                output[out_at..out_at + len],
                plain,
                "{what}: opening from one buffer to another"
            );

            let part = &mut output[out_at..out_at + len];
            let in_out = InOutBuf::new(&plain, part).expect("of one length");
            let made = ours.encrypt_inout_detached(&nonce, case.aad, in_out).expect("short enough");
            assert_eq!(
                (&output[out_at..out_at + len], made),
                (&sealed[..], tag),
                "{what}: sealing to another buffer"
            );

            refused(&ours, &case, &mut buffer[at..], tag.into(), &what);
            assert_eq!(buffer[at..], sealed, "{what}: what is refused is left alone");
            ours.decrypt_inout_detached(&nonce, case.aad, (&mut buffer[at..]).into(), &tag)
                .expect("authentic");
            assert_eq!(buffer[at..], plain, "{what}: opening in place");
        }
    }
}

/// Checks that opening fails with one bit flipped, and flips the bit back.
fn refused(ours: &Sm4Gcm, case: &Case<'_>, sealed: &mut [u8], mut tag: [u8; 16], what: &str) {
    let mut aad = case.aad.to_vec();
    let mut bit = usize::from(case.flipped) % (8 * (16 + sealed.len() + aad.len()));
    let mut part = 0;
    for len in [16, sealed.len()] {
        if bit >= 8 * len {
            bit -= 8 * len;
            part += 1;
        } else {
            break;
        }
    }
    let flip = |bytes: &mut [u8]| bytes[bit / 8] ^= 1 << (bit % 8);
    match part {
        0 => flip(&mut tag),
        1 => flip(sealed),
        _ => flip(&mut aad),
    }
    let opened =
        ours.decrypt_inout_detached(&case.nonce.into(), &aad, (&mut *sealed).into(), &tag.into());
    assert!(opened.is_err(), "{what}: opened with bit {bit} of part {part} flipped");
    if part == 1 {
        flip(sealed);
    }
}

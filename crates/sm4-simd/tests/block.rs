//! The block cipher against the standard and against the RustCrypto crate `sm4`, on every backend
//! of this machine.

#![allow(clippy::unwrap_used)]

mod common;

use common::backends;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use sm4_simd::{
    Backend, Sm4,
    cipher::{
        Array, BlockCipherDecrypt, BlockCipherEncrypt, InOutBuf, InnerIvInit, KeyInit, KeyIvInit,
        StreamCipher, consts::U16,
    },
};

type Block = Array<u8, U16>;

const KEY: u128 = 0x0123_4567_89ab_cdef_fedc_ba98_7654_3210;

/// GB/T 32907-2016, appendix A.1, and A.2: the same block after a million encryptions.
#[test]
fn vectors_of_the_standard() {
    for backend in backends() {
        let key = Sm4::with_backend(&KEY.to_be_bytes().into(), backend).unwrap();
        let mut block = Block::from(KEY.to_be_bytes());
        key.encrypt_block(&mut block);
        assert_eq!(
            block.0,
            0x681e_df34_d206_965e_86b3_e94f_536e_4246_u128.to_be_bytes(),
            "{backend}"
        );
        key.decrypt_block(&mut block);
        assert_eq!(block.0, KEY.to_be_bytes(), "{backend}");
        for _ in 0..1_000_000 {
            key.encrypt_block(&mut block);
        }
        assert_eq!(
            block.0,
            0x5952_98c7_c6fd_271f_0402_f804_c33d_3f66_u128.to_be_bytes(),
            "{backend}"
        );
    }
}

/// Any number of blocks up to a few groups of every backend, in both directions, in place and not.
#[test]
fn blocks_are_those_of_rustcrypto() {
    let mut rng = StdRng::seed_from_u64(4);
    for backend in backends() {
        for len in 0..=200 {
            let key: [u8; 16] = rng.random();
            let ours = Sm4::with_backend(&key.into(), backend).unwrap();
            let theirs = sm4::Sm4::new(&key.into());
            let plain: Vec<Block> =
                (0..len).map(|_| Block::from(rng.random::<[u8; 16]>())).collect();
            let mut sealed = plain.clone();
            theirs.encrypt_blocks(&mut sealed);

            let mut blocks = plain.clone();
            ours.encrypt_blocks(&mut blocks);
            assert_eq!(blocks, sealed, "{backend}, {len} blocks");
            ours.decrypt_blocks(&mut blocks);
            assert_eq!(blocks, plain, "{backend}, {len} blocks");

            let mut out = vec![Block::default(); len];
            ours.encrypt_blocks_inout(InOutBuf::new(&plain, &mut out).unwrap());
            assert_eq!(out, sealed, "{backend}, {len} blocks");
            ours.decrypt_blocks_inout(InOutBuf::new(&sealed, &mut out).unwrap());
            assert_eq!(out, plain, "{backend}, {len} blocks");
        }
    }
}

/// `ctr` accepts this crate's cipher in place of RustCrypto's.
#[test]
fn ctr_is_that_of_rustcrypto() {
    let mut rng = StdRng::seed_from_u64(5);
    for backend in backends() {
        for len in (0..2100).step_by(13) {
            let (key, iv): ([u8; 16], [u8; 16]) = (rng.random(), rng.random());
            let mut ours: Vec<u8> = (0..len).map(|_| rng.random()).collect();
            let mut theirs = ours.clone();
            let cipher = Sm4::with_backend(&key.into(), backend).unwrap();
            let core =
                ctr::CtrCore::<Sm4, ctr::flavors::Ctr32BE>::inner_iv_init(cipher, &iv.into());
            ctr::Ctr32BE::<Sm4>::from_core(core).apply_keystream(&mut ours);
            ctr::Ctr32BE::<sm4::Sm4>::new(&key.into(), &iv.into()).apply_keystream(&mut theirs);
            assert_eq!(ours, theirs, "{backend}, {len} bytes");
        }
    }
}

#[test]
fn what_debug_shows() {
    let key = Sm4::new(&KEY.to_be_bytes().into());
    assert_eq!(format!("{key:?}"), format!("Sm4 {{ backend: {:?}, .. }}", Backend::detect()));
    assert_eq!(key.backend(), Backend::detect());
}

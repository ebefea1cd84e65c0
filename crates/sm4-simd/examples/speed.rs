//! Prints the backend for this processor, and its speed beside that of RustCrypto's `ctr`, `sm4`
//! and `aes-gcm`:
//!
//! ```sh
//! cargo run --release --features gcm --example speed
//! ```
//!
//! It measures all contenders in turn, many times, and takes the fastest round of each. So other
//! load on the machine and changes of its clock affect all of them equally. The ratios are more
//! reliable than the rates.

#![allow(clippy::unwrap_used, clippy::type_complexity)]

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use aes_gcm::{
    AesGcm,
    aead::{AeadInOut, KeyInit, consts::U12, inout::InOutBuf},
};
use ctr::{
    Ctr32BE,
    cipher::{KeyIvInit, StreamCipher},
};
use sm4_simd::{Backend, Sm4, Sm4Gcm};

const LEN: usize = 64 << 10;
const KEY: [u8; 16] = [7; 16];
const ROUNDS: usize = 60;

/// The operation of a contender on `LEN` bytes.
type Run<'a> = dyn FnMut(&mut [u8]) + 'a;

/// One contender.
struct Contender<'a> {
    name: String,
    run: Box<Run<'a>>,
    best: Duration,
}

impl<'a> Contender<'a> {
    fn new(name: impl Into<String>, run: impl FnMut(&mut [u8]) + 'a) -> Self {
        Self { name: name.into(), run: Box::new(run), best: Duration::MAX }
    }
}

/// Measures all in turn. Prints their rates, and their ratios to the first one's rate.
fn race(title: &str, mut contenders: Vec<Contender<'_>>) {
    let mut data = vec![0; LEN];
    for _ in 0..ROUNDS {
        for contender in &mut contenders {
            let start = Instant::now();
            (contender.run)(black_box(&mut data));
            contender.best = contender.best.min(start.elapsed());
        }
    }
    println!("{title}, {} KiB", LEN / 1024);
    let first = contenders[0].best;
    for Contender { name, best, .. } in &contenders {
        let rate = LEN as f64 / best.as_secs_f64() / 1e6;
        println!(
            "  {name:<32} {rate:>8.0} MB/s {:>7.1} x",
            first.as_secs_f64() / best.as_secs_f64()
        );
    }
}

fn seal(cipher: &impl AeadInOut<NonceSize = U12>, data: &mut [u8]) {
    black_box(cipher.encrypt_inout_detached(&[0; 12].into(), b"", data.into()))
        .expect("short enough");
}

/// Opens the same sealed data again and again, into another buffer.
fn opener<'a, C: AeadInOut<NonceSize = U12>>(cipher: &'a C) -> impl FnMut(&mut [u8]) + 'a {
    let mut sealed = vec![1; LEN];
    let tag = cipher
        .encrypt_inout_detached(&[0; 12].into(), b"", (&mut sealed[..]).into())
        .expect("short enough");
    move |data| {
        let in_out = InOutBuf::new(&sealed, data).expect("of one length");
        cipher.decrypt_inout_detached(&[0; 12].into(), b"", in_out, &tag).expect("authentic");
    }
}

fn main() {
    println!("detected: {}", Backend::detect());
    let multiplier = Sm4Gcm::multipliers().last().expect("the portable one");
    println!("GHASH:    {multiplier}");
    let backends: Vec<_> =
        Backend::ALL.into_iter().filter(|backend| backend.is_available()).collect();

    let mut contenders = vec![Contender::new("ctr + sm4 of RustCrypto", |data| {
        Ctr32BE::<sm4::Sm4>::new(&KEY.into(), &[0; 16].into()).apply_keystream(data);
    })];
    contenders.push(Contender::new("ctr of RustCrypto + ours", |data| {
        Ctr32BE::<Sm4>::new(&KEY.into(), &[0; 16].into()).apply_keystream(data);
    }));
    for &backend in &backends {
        let cipher = Sm4::with_backend(&KEY.into(), backend).expect("available");
        contenders.push(Contender::new(backend.name(), move |data| {
            cipher.ctr32(&[0; 12], 0, data.into())
        }));
    }
    race("SM4-CTR", contenders);

    let theirs = AesGcm::<sm4::Sm4, U12>::new(&KEY.into());
    let mixed = AesGcm::<Sm4, U12>::new(&KEY.into());
    let ours: Vec<_> = backends
        .iter()
        .map(|&backend| {
            let name = backend.name();
            (name, Sm4Gcm::with_backend(&KEY.into(), backend, multiplier).expect("available"))
        })
        .collect();
    let mut contenders = vec![
        Contender::new("aes-gcm + sm4 of RustCrypto", |data| seal(&theirs, data)),
        Contender::new("aes-gcm of RustCrypto + ours", |data| seal(&mixed, data)),
    ];
    contenders
        .extend(ours.iter().map(|(name, cipher)| Contender::new(*name, |data| seal(cipher, data))));
    race("SM4-GCM, seal in place", contenders);

    let mut contenders = vec![
        Contender::new("aes-gcm + sm4 of RustCrypto", opener(&theirs)),
        Contender::new("aes-gcm of RustCrypto + ours", opener(&mixed)),
    ];
    contenders.extend(ours.iter().map(|(name, cipher)| Contender::new(*name, opener(cipher))));
    race("SM4-GCM, open out of place", contenders);
}

//! AES-256-GCM and SM4-GCM of the engine's providers, compared with other libraries and with the
//! libraries that the providers wrap.
//!
//! ```sh
//! apt-get install libgcrypt20-dev libssl-dev
//! cargo run --release --manifest-path benches/peers/Cargo.toml
//! ```
//!
//! For each size, all contenders are measured in turn, many times, so other load and changes of the
//! clock affect all of them equally. The table has the rate of each contender's fastest round, and
//! its ratio to the first contender. Sealing is in place, as in the engine. Opening is from one
//! buffer into another; a library that can only open in place copies first.

mod c;

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use aes_gcm::{
    Aes256Gcm, AesGcm,
    aead::{AeadInOut, KeyInit, consts::U12, inout::InOutBuf},
};
use envelog::crypto::{AeadKey, AwsLc, Cipher, CryptoProvider, RustCrypto, Sm4Simd};

const SIZES: [usize; 4] = [256, 4 << 10, 64 << 10, 1 << 20];
const ROUNDS: usize = 150;
/// The bytes of a round, so that the clock's resolution does not matter.
const BYTES_PER_ROUND: usize = 256 << 10;
const AAD: [u8; 32] = [9; 32];
const NONCE: [u8; 12] = [3; 12];
const AES_KEY: [u8; 32] = [7; 32];
const SM4_KEY: [u8; 16] = [7; 16];

/// Encrypts in place, and returns the tag.
type Seal = Box<dyn FnMut(&mut [u8]) -> [u8; 16]>;
/// Decrypts the first buffer, with the tag, into the second.
type Open = Box<dyn FnMut(&[u8], &[u8; 16], &mut [u8])>;

struct Contender {
    name: &'static str,
    seal: Seal,
    open: Open,
}

impl Contender {
    fn new(
        name: &'static str,
        seal: impl FnMut(&mut [u8]) -> [u8; 16] + 'static,
        open: impl FnMut(&[u8], &[u8; 16], &mut [u8]) + 'static,
    ) -> Self {
        Self { name, seal: Box::new(seal), open: Box::new(open) }
    }
}

/// A provider of the engine.
fn engine(
    name: &'static str,
    provider: impl CryptoProvider,
    cipher: Cipher,
    key: &[u8],
) -> Contender {
    let key = || -> Box<dyn AeadKey> { provider.aead(cipher, key).expect("a good key") };
    let (sealer, opener) = (key(), key());
    Contender::new(
        name,
        move |data| sealer.seal(&NONCE, &AAD, data).expect("seals"),
        move |data, tag, out| opener.open(&NONCE, &AAD, data, tag, out).expect("opens"),
    )
}

/// A cipher that implements the traits of RustCrypto.
fn rustcrypto<G: AeadInOut<NonceSize = U12> + KeyInit + 'static>(
    name: &'static str,
    key: &[u8],
) -> Contender {
    let cipher = || G::new_from_slice(key).expect("a good key");
    let (sealer, opener) = (cipher(), cipher());
    Contender::new(
        name,
        move |data| {
            let tag =
                sealer.encrypt_inout_detached(&NONCE.into(), &AAD, data.into()).expect("seals");
            tag.as_slice().try_into().expect("16 bytes")
        },
        move |data, tag, out| {
            let tag = tag.as_slice().try_into().expect("16 bytes");
            let in_out = InOutBuf::new(data, out).expect("of one length");
            opener.decrypt_inout_detached(&NONCE.into(), &AAD, in_out, &tag).expect("opens");
        },
    )
}

fn aws_lc() -> Contender {
    use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    let key = || LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &AES_KEY).expect("a good key"));
    let (sealer, opener) = (key(), key());
    let nonce = || Nonce::assume_unique_for_key(NONCE);
    Contender::new(
        "aws-lc-rs",
        move |data| {
            let tag =
                sealer.seal_in_place_separate_tag(nonce(), Aad::from(&AAD), data).expect("seals");
            tag.as_ref().try_into().expect("16 bytes")
        },
        move |data, tag, out| {
            opener.open_separate_gather(nonce(), Aad::from(&AAD), data, tag, out).expect("opens")
        },
    )
}

fn ring() -> Contender {
    use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    let key = || LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &AES_KEY).expect("a good key"));
    let (sealer, opener) = (key(), key());
    let nonce = || Nonce::assume_unique_for_key(NONCE);
    Contender::new(
        "ring",
        move |data| {
            let tag =
                sealer.seal_in_place_separate_tag(nonce(), Aad::from(&AAD), data).expect("seals");
            tag.as_ref().try_into().expect("16 bytes")
        },
        move |data, tag, out| {
            out.copy_from_slice(data);
            opener
                .open_in_place_separate_tag(nonce(), Aad::from(&AAD), (*tag).into(), out, 0..)
                .expect("opens");
        },
    )
}

fn graviola() -> Contender {
    use graviola::aead::AesGcm;
    let (sealer, opener) = (AesGcm::new(&AES_KEY), AesGcm::new(&AES_KEY));
    Contender::new(
        "graviola",
        move |data| {
            let mut tag = [0; 16];
            sealer.encrypt(&NONCE, &AAD, data, &mut tag);
            tag
        },
        move |data, tag, out| {
            out.copy_from_slice(data);
            opener.decrypt(&NONCE, &AAD, out, tag).expect("opens");
        },
    )
}

/// One row for each contender, one pair of columns (rate, ratio to the first) for each size.
fn race(
    title: &str,
    contenders: &mut [Contender],
    mut run: impl FnMut(&mut Contender, &mut Buffers),
) {
    let mut best = vec![[Duration::MAX; SIZES.len()]; contenders.len()];
    for (column, size) in SIZES.into_iter().enumerate() {
        let mut buffers = Buffers::new(&mut contenders[0], size);
        let repeats = BYTES_PER_ROUND.div_ceil(size);
        for _ in 0..ROUNDS {
            for (row, contender) in contenders.iter_mut().enumerate() {
                let start = Instant::now();
                for _ in 0..repeats {
                    run(contender, black_box(&mut buffers));
                }
                best[row][column] = best[row][column].min(start.elapsed() / repeats as u32);
            }
        }
    }
    println!(
        "\n| {title}, MB/s (of the first) | 256 B | 4 KiB | 64 KiB | 1 MiB |\n|---|---|---|---|---|"
    );
    for (contender, times) in contenders.iter().zip(&best) {
        let cells = times.iter().zip(&best[0]).zip(SIZES).map(|((time, first), size)| {
            let rate = size as f64 / time.as_secs_f64() / 1e6;
            format!(" {rate:.0} ({:.2}) |", first.as_secs_f64() / time.as_secs_f64())
        });
        println!("| {} |{}", contender.name, cells.collect::<String>());
    }
}

/// The buffers of a contender.
struct Buffers {
    plain: Vec<u8>,
    sealed: Vec<u8>,
    tag: [u8; 16],
    out: Vec<u8>,
}

impl Buffers {
    fn new(by: &mut Contender, size: usize) -> Self {
        let mut sealed = vec![1; size];
        let tag = (by.seal)(&mut sealed);
        Self { plain: vec![1; size], sealed, tag, out: vec![0; size] }
    }
}

/// Checks that all contenders for one function give the same result.
fn agree(contenders: &mut [Contender]) {
    let buffers = Buffers::new(&mut contenders[0], 1000);
    for contender in contenders {
        let mut data = vec![1; 1000];
        assert_eq!((contender.seal)(&mut data), buffers.tag, "{}", contender.name);
        assert_eq!(data, buffers.sealed, "{}", contender.name);
        let mut out = vec![0; 1000];
        (contender.open)(&data, &buffers.tag, &mut out);
        assert_eq!(out, [1; 1000], "{}", contender.name);
    }
}

fn race_both(cipher: &str, mut contenders: Vec<Contender>) {
    agree(&mut contenders);
    race(&format!("{cipher}, seal"), &mut contenders, |contender, buffers| {
        black_box((contender.seal)(&mut buffers.plain));
    });
    race(&format!("{cipher}, open"), &mut contenders, |contender, buffers| {
        (contender.open)(&buffers.sealed, &buffers.tag, &mut buffers.out);
    });
}

fn main() {
    println!(
        "sm4-simd: {:?}; libgcrypt {}; {}",
        sm4_simd::Backend::detect(),
        c::gcrypt_version(),
        c::openssl_version()
    );
    race_both(
        "AES-256-GCM",
        vec![
            aws_lc(),
            engine("engine, AwsLc", AwsLc::new(), Cipher::Aes256Gcm, &AES_KEY),
            ring(),
            graviola(),
            rustcrypto::<Aes256Gcm>("aes-gcm", &AES_KEY),
            c::gcrypt(c::Algorithm::Aes256, &AES_KEY),
        ],
    );
    race_both(
        "SM4-GCM",
        vec![
            engine("engine, RustCrypto", RustCrypto::new(), Cipher::Sm4Gcm, &SM4_KEY),
            engine("engine, AwsLc", AwsLc::new(), Cipher::Sm4Gcm, &SM4_KEY),
            engine("engine, Sm4Simd", Sm4Simd::new(), Cipher::Sm4Gcm, &SM4_KEY),
            rustcrypto::<AesGcm<sm4::Sm4, U12>>("aes-gcm + sm4", &SM4_KEY),
            c::gcrypt(c::Algorithm::Sm4, &SM4_KEY),
        ],
    );
    // OpenSSL 3.0 has no SM4-GCM. Its counter mode alone is an upper bound for one.
    let mut contenders = vec![c::openssl_ctr(&SM4_KEY)];
    race("SM4-CTR, no tag", &mut contenders, |contender, buffers| {
        black_box((contender.seal)(&mut buffers.plain));
    });
}

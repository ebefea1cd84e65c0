//! Every backend beside RustCrypto: counter mode, sealing and opening with GCM at several lengths,
//! and the key setup.
//!
//! ```sh
//! cargo bench -p sm4-simd --features gcm
//! ```

use std::hint::black_box;

use aes_gcm::{
    AesGcm,
    aead::{AeadInOut, KeyInit, consts::U12, inout::InOutBuf},
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ctr::{
    CtrCore,
    cipher::{InnerIvInit, StreamCipherCore},
    flavors,
};
use sm4_simd::{Backend, Sm4, Sm4Gcm};

const LENGTHS: [usize; 4] = [256, 4 << 10, 64 << 10, 1 << 20];
const KEY: [u8; 16] = [7; 16];

fn backends() -> impl Iterator<Item = Backend> {
    Backend::ALL.into_iter().filter(|backend| backend.is_available())
}

fn counter_mode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ctr");
    for len in LENGTHS {
        let mut data = vec![0; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::new("rustcrypto", len), |bencher| {
            let cipher = sm4::Sm4::new(&KEY.into());
            bencher.iter(|| {
                let core = CtrCore::<_, flavors::Ctr32BE>::inner_iv_init(&cipher, &[0; 16].into());
                core.apply_keystream_partial(black_box(&mut data[..]).into());
            });
        });
        for backend in backends() {
            let cipher = Sm4::with_backend(&KEY.into(), backend).expect("available");
            group.bench_function(BenchmarkId::new(backend.name(), len), |bencher| {
                bencher.iter(|| cipher.ctr32(&[0; 12], 0, black_box(&mut data[..]).into()));
            });
        }
    }
}

fn gcm(criterion: &mut Criterion) {
    for len in LENGTHS {
        both(criterion, "rustcrypto", len, &AesGcm::<sm4::Sm4, U12>::new(&KEY.into()));
        both(criterion, "rustcrypto-gcm-over-ours", len, &AesGcm::<Sm4, U12>::new(&KEY.into()));
        let multiplier = Sm4Gcm::multipliers().last().expect("the portable one");
        for backend in backends() {
            let cipher = Sm4Gcm::with_backend(&KEY.into(), backend, multiplier).expect("available");
            both(criterion, backend.name(), len, &cipher);
        }
    }
}

/// Seals in place, and opens from one buffer into another.
fn both(
    criterion: &mut Criterion,
    name: &str,
    len: usize,
    cipher: &impl AeadInOut<NonceSize = U12>,
) {
    let nonce = [0; 12].into();
    let mut sealed = vec![0; len];
    let tag =
        cipher.encrypt_inout_detached(&nonce, b"", (&mut sealed[..]).into()).expect("short enough");

    let mut group = criterion.benchmark_group("gcm");
    group.throughput(Throughput::Bytes(len as u64));
    let mut data = vec![0; len];
    group.bench_function(BenchmarkId::new(format!("seal-{name}"), len), |bencher| {
        bencher
            .iter(|| cipher.encrypt_inout_detached(&nonce, b"", black_box(&mut data[..]).into()));
    });
    group.bench_function(BenchmarkId::new(format!("open-{name}"), len), |bencher| {
        bencher.iter(|| {
            let in_out = InOutBuf::new(black_box(&sealed), &mut data).expect("of one length");
            cipher.decrypt_inout_detached(&nonce, b"", in_out, &tag).expect("authentic");
        });
    });
}

fn key_setup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("key");
    group.bench_function("sm4-rustcrypto", |bencher| {
        bencher.iter(|| sm4::Sm4::new(black_box(&KEY.into())))
    });
    group.bench_function("sm4", |bencher| bencher.iter(|| Sm4::new(black_box(&KEY.into()))));
    group.bench_function("gcm-rustcrypto", |bencher| {
        bencher.iter(|| AesGcm::<sm4::Sm4, U12>::new(black_box(&KEY.into())));
    });
    group.bench_function("gcm", |bencher| bencher.iter(|| Sm4Gcm::new(black_box(&KEY.into()))));
}

criterion_group!(benches, counter_mode, gcm, key_setup);
criterion_main!(benches);

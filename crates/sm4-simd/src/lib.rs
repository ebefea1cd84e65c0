#![doc = include_str!("../README.md")]
#![no_std]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(test)]
extern crate std;

mod backend;
mod field;
#[cfg(feature = "gcm")]
mod gcm;
#[cfg(feature = "gcm")]
mod ghash;
mod portable;
#[cfg(any(target_arch = "x86_64", test))]
mod simd;
#[cfg(all(test, feature = "gcm"))]
mod soft;
#[cfg(target_arch = "x86_64")]
mod x86;

use core::{fmt, marker::PhantomData};

pub use cipher;
use cipher::{
    AlgorithmName, Block, BlockCipherDecBackend, BlockCipherDecClosure, BlockCipherDecrypt,
    BlockCipherEncBackend, BlockCipherEncClosure, BlockCipherEncrypt, BlockSizeUser, InOut,
    InOutBuf, Key, KeyInit, KeySizeUser, ParBlocks, ParBlocksSizeUser,
    array::ArraySize,
    consts::{U16, U32, U64, U256},
    zeroize::{Zeroize, ZeroizeOnDrop},
};

pub use crate::backend::Backend;
#[cfg(feature = "gcm")]
pub use crate::gcm::Sm4Gcm;
use crate::portable::RoundKeys;

/// The SM4 block cipher (GB/T 32907-2016) with an expanded key. The key is overwritten on drop.
#[derive(Clone)]
pub struct Sm4 {
    round_keys: RoundKeys,
    backend: Backend,
}

impl Sm4 {
    /// The cipher with the given backend. `None` if this processor does not support it. For tests
    /// and benchmarks: [`KeyInit::new`] takes the fastest.
    #[doc(hidden)]
    #[must_use]
    pub fn with_backend(key: &Key<Self>, backend: Backend) -> Option<Self> {
        backend
            .is_available()
            .then(|| Self { round_keys: portable::expand_key(key.as_ref()), backend })
    }

    /// The backend that this key uses.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.backend
    }

    fn crypt<const DECRYPT: bool>(&self, blocks: InOutBuf<'_, '_, Block<Self>>) {
        match self.backend {
            Backend::Portable => self.crypt_portable::<DECRYPT>(blocks),
            #[cfg(target_arch = "x86_64")]
            backend => {
                let crypt = match backend {
                    Backend::Portable | Backend::AesNi => x86::aes_ni::crypt::<DECRYPT>,
                    Backend::Avx2AesNi => x86::avx2_aes_ni::crypt::<DECRYPT>,
                    Backend::Avx2Vaes => x86::avx2_vaes::crypt::<DECRYPT>,
                    Backend::Avx2Gfni => x86::avx2_gfni::crypt::<DECRYPT>,
                    Backend::Avx512Gfni => x86::avx512_gfni::crypt::<DECRYPT>,
                };
                let len = blocks.len();
                let (input, output) = blocks.into_raw();
                // SAFETY: a key only has a backend that the processor supports (`with_backend`). An
                // `InOutBuf` points to `len` input and output blocks, which are the same or do not
                // overlap.
                unsafe { crypt(&self.round_keys, input.cast(), output.cast(), len) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => self.crypt_portable::<DECRYPT>(blocks),
        }
    }

    fn crypt_portable<const DECRYPT: bool>(&self, blocks: InOutBuf<'_, '_, Block<Self>>) {
        let (groups, tail) = blocks.into_chunks::<U16>();
        for group in groups {
            self.crypt_portable_group::<DECRYPT>(group.into_buf());
        }
        if !tail.is_empty() {
            self.crypt_portable_group::<DECRYPT>(tail);
        }
    }

    fn crypt_portable_group<const DECRYPT: bool>(&self, mut blocks: InOutBuf<'_, '_, Block<Self>>) {
        let mut group = [[0; 16]; portable::BLOCKS];
        let group = &mut group[..blocks.len()];
        for (to, from) in group.iter_mut().zip(blocks.get_in()) {
            *to = (*from).into();
        }
        let round_keys = self.round_keys.iter().copied();
        if DECRYPT {
            portable::crypt(round_keys.rev(), group)
        } else {
            portable::crypt(round_keys, group)
        }
        for (to, from) in blocks.get_out().iter_mut().zip(group) {
            *to = (*from).into();
        }
    }

    /// Counter mode with a 32-bit counter: adds to `data` the encrypted blocks `nonce || counter`,
    /// `nonce || counter + 1`, … The counter is big-endian and modulo 2^32. More than 2^36 bytes
    /// repeat the key stream.
    ///
    /// It is the same function as `ctr::Ctr32BE`, but computes the counters in vectors, and data
    /// goes directly from input to output. It authenticates nothing.
    pub fn ctr32(&self, nonce: &[u8; 12], mut counter: u32, data: InOutBuf<'_, '_, u8>) {
        match self.backend {
            #[cfg(target_arch = "x86_64")]
            backend if backend != Backend::Portable => {
                let ctr = match backend {
                    Backend::Portable | Backend::AesNi => x86::aes_ni::ctr,
                    Backend::Avx2AesNi => x86::avx2_aes_ni::ctr,
                    Backend::Avx2Vaes => x86::avx2_vaes::ctr,
                    Backend::Avx2Gfni => x86::avx2_gfni::ctr,
                    Backend::Avx512Gfni => x86::avx512_gfni::ctr,
                };
                let len = data.len();
                let (input, output) = data.into_raw();
                // SAFETY: a key only has a backend that the processor supports (`with_backend`). An
                // `InOutBuf` points to `len` input and output bytes, which are the same or do not
                // overlap.
                unsafe { ctr(&self.round_keys, nonce, counter, input, output, len) }
            }
            _ => {
                let (groups, mut tail) = data.into_chunks::<U256>();
                for mut group in groups {
                    let mut stream = self.portable_stream(nonce, counter);
                    group.xor_in2out((&stream).into());
                    stream[..].zeroize();
                    counter = counter.wrapping_add(portable::BLOCKS as u32);
                }
                if !tail.is_empty() {
                    let len = tail.len();
                    let mut stream = self.portable_stream(nonce, counter);
                    tail.xor_in2out(&stream[..len]);
                    stream[..].zeroize();
                }
            }
        }
    }

    fn portable_stream(&self, nonce: &[u8; 12], counter: u32) -> [u8; 256] {
        let mut stream = [0; 256];
        let blocks = stream.as_chunks_mut().0;
        for (block, i) in blocks.iter_mut().zip(0..) {
            block[..12].copy_from_slice(nonce);
            block[12..].copy_from_slice(&counter.wrapping_add(i).to_be_bytes());
        }
        portable::crypt(self.round_keys.iter().copied(), blocks);
        stream
    }
}

impl KeySizeUser for Sm4 {
    type KeySize = U16;
}

impl KeyInit for Sm4 {
    fn new(key: &Key<Self>) -> Self {
        Self { round_keys: portable::expand_key(key.as_ref()), backend: Backend::detect() }
    }
}

impl BlockSizeUser for Sm4 {
    type BlockSize = U16;
}

fn only<'inp, 'out>(block: InOut<'inp, 'out, Block<Sm4>>) -> InOutBuf<'inp, 'out, Block<Sm4>> {
    let (input, output) = block.into_raw();
    // SAFETY: the pointers come from an `InOut`, so each is valid for one block, and they are equal
    // or do not overlap.
    unsafe { InOutBuf::from_raw(input, output, 1) }
}

/// A key in the form of a backend that processes `N` blocks at once.
struct Wide<'a, N>(&'a Sm4, PhantomData<N>);

impl<N> BlockSizeUser for Wide<'_, N> {
    type BlockSize = U16;
}

impl<N: ArraySize> ParBlocksSizeUser for Wide<'_, N> {
    type ParBlocksSize = N;
}

impl<N: ArraySize> BlockCipherEncBackend for Wide<'_, N> {
    #[inline]
    fn encrypt_block(&self, block: InOut<'_, '_, Block<Self>>) {
        self.0.crypt::<false>(only(block));
    }

    #[inline]
    fn encrypt_par_blocks(&self, blocks: InOut<'_, '_, ParBlocks<Self>>) {
        self.0.crypt::<false>(blocks.into_buf());
    }

    #[inline]
    fn encrypt_tail_blocks(&self, blocks: InOutBuf<'_, '_, Block<Self>>) {
        self.0.crypt::<false>(blocks);
    }
}

impl<N: ArraySize> BlockCipherDecBackend for Wide<'_, N> {
    #[inline]
    fn decrypt_block(&self, block: InOut<'_, '_, Block<Self>>) {
        self.0.crypt::<true>(only(block));
    }

    #[inline]
    fn decrypt_par_blocks(&self, blocks: InOut<'_, '_, ParBlocks<Self>>) {
        self.0.crypt::<true>(blocks.into_buf());
    }

    #[inline]
    fn decrypt_tail_blocks(&self, blocks: InOutBuf<'_, '_, Block<Self>>) {
        self.0.crypt::<true>(blocks);
    }
}

impl BlockCipherEncrypt for Sm4 {
    fn encrypt_with_backend(&self, f: impl BlockCipherEncClosure<BlockSize = Self::BlockSize>) {
        match self.backend {
            Backend::Portable | Backend::AesNi => f.call(&Wide::<U16>(self, PhantomData)),
            Backend::Avx2AesNi | Backend::Avx2Vaes | Backend::Avx2Gfni => {
                f.call(&Wide::<U32>(self, PhantomData))
            }
            Backend::Avx512Gfni => f.call(&Wide::<U64>(self, PhantomData)),
        }
    }
}

impl BlockCipherDecrypt for Sm4 {
    fn decrypt_with_backend(&self, f: impl BlockCipherDecClosure<BlockSize = Self::BlockSize>) {
        match self.backend {
            Backend::Portable | Backend::AesNi => f.call(&Wide::<U16>(self, PhantomData)),
            Backend::Avx2AesNi | Backend::Avx2Vaes | Backend::Avx2Gfni => {
                f.call(&Wide::<U32>(self, PhantomData))
            }
            Backend::Avx512Gfni => f.call(&Wide::<U64>(self, PhantomData)),
        }
    }
}

impl AlgorithmName for Sm4 {
    fn write_alg_name(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sm4")
    }
}

impl fmt::Debug for Sm4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sm4").field("backend", &self.backend).finish_non_exhaustive()
    }
}

impl Drop for Sm4 {
    fn drop(&mut self) {
        self.round_keys.zeroize();
    }
}

impl ZeroizeOnDrop for Sm4 {}

#[cfg(test)]
mod tests {
    use core::{mem::MaybeUninit, ptr};

    use super::*;

    #[test]
    fn round_keys_are_overwritten_on_drop() {
        let mut key = MaybeUninit::new(Sm4::new(&[7; 16].into()));
        // SAFETY: initialized above and dropped once. Afterwards only the array is read. All bit
        // patterns are valid for it, and its memory still exists.
        let (before, after) = unsafe {
            let key = key.as_mut_ptr();
            let round_keys = &raw const (*key).round_keys;
            let before = round_keys.read();
            ptr::drop_in_place(key);
            (before, round_keys.read())
        };
        assert_ne!(before, [0; 32]);
        assert_eq!(after, [0; 32]);
    }
}

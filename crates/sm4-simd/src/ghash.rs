//! GHASH (NIST SP 800-38D, section 6.4) with carry-less multiplications, several blocks at a time.
//!
//! Blocks and keys are byte-reversed, and the key is multiplied by x once. The product of two
//! elements is then that of POLYVAL (RFC 8452, appendix A), `a · b · x⁻¹²⁸`, which needs no shift
//! of the 256-bit result. Sixteen blocks are multiplied by sixteen powers of the key and summed
//! before one reduction.

use cipher::zeroize::{Zeroize, ZeroizeOnDrop};
use ghash::{GHash, universal_hash::UniversalHash};

const BLOCK: usize = 16;

/// The number of blocks for one reduction.
const STRIDE: usize = 16;

/// The instructions for the multiplication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Multiplier {
    /// The crate `ghash`.
    Portable,
    /// `PCLMULQDQ`.
    #[cfg(target_arch = "x86_64")]
    Clmul128,
    /// `VPCLMULQDQ` with AVX2.
    #[cfg(target_arch = "x86_64")]
    Clmul256,
    /// `VPCLMULQDQ` with AVX-512.
    #[cfg(target_arch = "x86_64")]
    Clmul512,
}

impl Multiplier {
    /// All multiplications, the fastest last.
    pub(crate) const ALL: &[Multiplier] = &[
        Multiplier::Portable,
        #[cfg(target_arch = "x86_64")]
        Multiplier::Clmul128,
        #[cfg(target_arch = "x86_64")]
        Multiplier::Clmul256,
        #[cfg(target_arch = "x86_64")]
        Multiplier::Clmul512,
    ];

    pub(crate) fn is_available(self) -> bool {
        match self {
            Multiplier::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Multiplier::Clmul128 => crate::x86::detect::has_clmul_128(),
            #[cfg(target_arch = "x86_64")]
            Multiplier::Clmul256 => crate::x86::detect::has_clmul_256(),
            #[cfg(target_arch = "x86_64")]
            Multiplier::Clmul512 => crate::x86::detect::has_clmul_512(),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Multiplier::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Multiplier::Clmul128 => "clmul-128",
            #[cfg(target_arch = "x86_64")]
            Multiplier::Clmul256 => "clmul-256",
            #[cfg(target_arch = "x86_64")]
            Multiplier::Clmul512 => "clmul-512",
        }
    }

    pub(crate) fn detect() -> Self {
        Self::ALL
            .iter()
            .copied()
            .rev()
            .find(|multiplier| multiplier.is_available())
            .unwrap_or(Multiplier::Portable)
    }
}

/// The powers 16 to 1 of the key, in the representation of this module.
#[cfg(any(target_arch = "x86_64", test))]
#[derive(Clone)]
#[repr(align(64))]
pub(crate) struct Powers([[u8; BLOCK]; STRIDE]);

/// An expanded key. It is overwritten on drop: here, or by `ghash`, which is built with its feature
/// `zeroize`.
#[derive(Clone)]
pub(crate) enum GhashKey {
    Portable(GHash),
    #[cfg(target_arch = "x86_64")]
    Clmul(Powers, Multiplier),
}

#[cfg(any(target_arch = "x86_64", test))]
impl Drop for Powers {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

#[cfg(any(target_arch = "x86_64", test))]
impl ZeroizeOnDrop for Powers {}

impl GhashKey {
    /// Expands `key`. This processor must support `multiplier`.
    pub(crate) fn new(key: &[u8; BLOCK], multiplier: Multiplier) -> Self {
        assert!(multiplier.is_available(), "an instruction that this processor lacks");
        match multiplier {
            Multiplier::Portable => Self::Portable(GHash::new(key.into())),
            #[cfg(target_arch = "x86_64")]
            Multiplier::Clmul128 => {
                // SAFETY: asserted above.
                Self::Clmul(unsafe { crate::x86::ghash_128::expand(key) }, multiplier)
            }
            #[cfg(target_arch = "x86_64")]
            Multiplier::Clmul256 => {
                // SAFETY: asserted above.
                Self::Clmul(unsafe { crate::x86::ghash_256::expand(key) }, multiplier)
            }
            #[cfg(target_arch = "x86_64")]
            Multiplier::Clmul512 => {
                // SAFETY: asserted above.
                Self::Clmul(unsafe { crate::x86::ghash_512::expand(key) }, multiplier)
            }
        }
    }

    pub(crate) fn hasher(&self) -> Ghash<'_> {
        match self {
            Self::Portable(hash) => Ghash::Portable(hash.clone()),
            #[cfg(target_arch = "x86_64")]
            Self::Clmul(powers, multiplier) => {
                Ghash::Clmul { powers, multiplier: *multiplier, sum: [0; BLOCK] }
            }
        }
    }
}

/// A hash in progress.
pub(crate) enum Ghash<'a> {
    Portable(GHash),
    #[cfg(target_arch = "x86_64")]
    Clmul {
        powers: &'a Powers,
        multiplier: Multiplier,
        sum: [u8; BLOCK],
    },
    #[cfg(not(target_arch = "x86_64"))]
    Never(core::convert::Infallible, core::marker::PhantomData<&'a ()>),
}

impl Ghash<'_> {
    /// Hashes `data`, padded with zeros to whole blocks.
    pub(crate) fn update_padded(&mut self, data: &[u8]) {
        match self {
            Self::Portable(hash) => hash.update_padded(data),
            #[cfg(target_arch = "x86_64")]
            Self::Clmul { powers, multiplier, sum } => {
                let update = match multiplier {
                    Multiplier::Portable | Multiplier::Clmul128 => crate::x86::ghash_128::update,
                    Multiplier::Clmul256 => crate::x86::ghash_256::update,
                    Multiplier::Clmul512 => crate::x86::ghash_512::update,
                };
                // SAFETY: a key only has a multiplier that the processor supports
                // (`GhashKey::new`).
                unsafe { update(powers, sum, data) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Never(never, _) => match *never {},
        }
    }

    pub(crate) fn finalize(self) -> [u8; BLOCK] {
        match self {
            Self::Portable(hash) => hash.finalize().into(),
            #[cfg(target_arch = "x86_64")]
            Self::Clmul { mut sum, .. } => {
                sum.reverse();
                sum
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Never(never, _) => match never {},
        }
    }
}

/// A vector of elements, each in a lane of 128 bits, the least significant byte first.
///
/// # Safety
/// All methods require that the processor has the instructions of the vector, and that the calling
/// function is compiled for them.
#[cfg(any(target_arch = "x86_64", test))]
pub(crate) trait Elements: Copy {
    const LANES: usize;

    /// # Safety
    /// As documented at the trait. `16 * LANES` bytes must be readable.
    unsafe fn load(from: *const u8) -> Self;

    /// Loads into the first lane. The others are zero.
    unsafe fn load_one(from: &[u8; BLOCK]) -> Self;

    /// The first lane.
    unsafe fn first(self) -> [u8; BLOCK];

    /// Reverses the bytes of each lane.
    unsafe fn reverse(self) -> Self;

    unsafe fn xor(self, other: Self) -> Self;

    /// Three products: of the low halves; of each low half with the other high half, summed; and of
    /// the high halves.
    unsafe fn multiply(self, other: Self) -> [Self; 3];

    /// The low half times [`REDUCTION`], plus the two halves swapped.
    unsafe fn reduce_half(self) -> Self;

    /// The sum of all lanes, in the first lane. The others are zero.
    unsafe fn fold(self) -> Self;
}

/// The upper half of POLYVAL's polynomial, `x^127 + x^126 + x^121 + 1` without the last term.
#[cfg(any(target_arch = "x86_64", test))]
pub(crate) const REDUCTION: u64 = 0xc200_0000_0000_0000;

/// The sum of the products of all lanes, reduced: Montgomery's reduction, 64 bits at a time (S.
/// Gueron, A. Langley and Y. Lindell, "AES-GCM-SIV", section on POLYVAL; the same as in RFC 8452's
/// reference code).
///
/// # Safety
/// As documented at [`Elements`].
#[cfg(any(target_arch = "x86_64", test))]
#[inline(always)]
unsafe fn reduce<V: Elements>([low, middle, high]: [V; 3]) -> V {
    // SAFETY: the caller guarantees the instructions.
    unsafe {
        let (low, middle, high) = (low.fold(), middle.fold(), high.fold());
        high.xor(middle.xor(low.reduce_half()).reduce_half())
    }
}

/// # Safety
/// As documented at [`Elements`].
#[cfg(any(target_arch = "x86_64", test))]
#[inline(always)]
pub(crate) unsafe fn expand<V: Elements>(key: &[u8; BLOCK]) -> Powers {
    // Times x: a shift. The bit that leaves at the top is reduced by POLYVAL's polynomial, with a
    // mask and not a branch.
    let mut h = u128::from_be_bytes(*key);
    h = h << 1 ^ (h >> 127).wrapping_neg() & (u128::from(REDUCTION) << 64 | 1);
    let mut powers = Powers([[0; BLOCK]; STRIDE]);
    powers.0[STRIDE - 1] = h.to_le_bytes();
    // SAFETY: the caller guarantees the instructions.
    unsafe {
        let first = V::load_one(&powers.0[STRIDE - 1]);
        let mut power = first;
        for i in (0..STRIDE - 1).rev() {
            power = reduce(power.multiply(first));
            powers.0[i] = power.first();
        }
    }
    h.zeroize();
    powers
}

/// Hashes `data`, padded with zeros to whole blocks, into `sum`.
///
/// # Safety
/// As documented at [`Elements`].
#[cfg(any(target_arch = "x86_64", test))]
#[inline(always)]
pub(crate) unsafe fn update<V: Elements>(powers: &Powers, sum: &mut [u8; BLOCK], data: &[u8]) {
    let (strides, rest) = data.as_chunks::<{ STRIDE * BLOCK }>();
    // SAFETY: the caller guarantees the instructions. A stride has as many blocks as there are
    // powers, and the rest has fewer. Vectors are read from both at the same distance from their
    // ends.
    unsafe {
        let mut total = V::load_one(sum);
        for stride in strides {
            let at = |i: usize| i * V::LANES * BLOCK;
            let mut block = V::load(stride.as_ptr()).reverse().xor(total);
            let mut products = block.multiply(V::load(powers.0.as_ptr().cast()));
            for i in 1..STRIDE / V::LANES {
                block = V::load(stride.as_ptr().add(at(i))).reverse();
                products = add(
                    products,
                    block.multiply(V::load(powers.0.as_ptr().cast::<u8>().add(at(i)))),
                );
            }
            total = reduce(products);
        }
        if !rest.is_empty() {
            let (blocks, partial) = rest.as_chunks::<BLOCK>();
            let mut padded = [0; BLOCK];
            padded[..partial.len()].copy_from_slice(partial);
            let last = if partial.is_empty() { None } else { Some(&padded) };
            let count = blocks.len() + usize::from(!partial.is_empty());
            let powers = &powers.0[STRIDE - count..];

            let wide = blocks.len() / V::LANES * V::LANES;
            let zero = V::load_one(&[0; BLOCK]);
            let (mut products, mut first) = ([zero; 3], total);
            for i in (0..wide).step_by(V::LANES) {
                let block = V::load(blocks[i..].as_ptr().cast()).reverse().xor(first);
                products = add(products, block.multiply(V::load(powers[i..].as_ptr().cast())));
                first = zero;
            }
            for (block, power) in blocks[wide..].iter().chain(last).zip(&powers[wide..]) {
                let block = V::load_one(block).reverse().xor(first);
                products = add(products, block.multiply(V::load_one(power)));
                first = zero;
            }
            total = reduce(products);
        }
        *sum = total.first();
    }
}

/// # Safety
/// As documented at [`Elements`].
#[cfg(any(target_arch = "x86_64", test))]
#[inline(always)]
unsafe fn add<V: Elements>(a: [V; 3], b: [V; 3]) -> [V; 3] {
    // SAFETY: the caller guarantees the instructions.
    unsafe { [a[0].xor(b[0]), a[1].xor(b[1]), a[2].xor(b[2])] }
}

#[cfg(test)]
mod tests {
    use core::{mem::MaybeUninit, ptr};

    use super::*;

    #[test]
    fn powers_are_overwritten_on_drop() {
        let mut powers = MaybeUninit::new(Powers([[7; BLOCK]; STRIDE]));
        // SAFETY: initialized above and dropped once. Afterwards only the array is read. All bit
        // patterns are valid for it, and its memory still exists.
        let after = unsafe {
            let powers = powers.as_mut_ptr();
            ptr::drop_in_place(powers);
            (&raw const (*powers).0).read()
        };
        assert_eq!(after, [[0; BLOCK]; STRIDE]);
    }
}

//! The S-box of SM4 through the field of AES, derived at compile time.
//!
//! Both ciphers build their S-box from inversion in a field of 256 elements, but they represent the
//! field by different polynomials:
//!
//! - AES (FIPS 197): `x^8 + x^4 + x^3 + x + 1`, and `S_aes(x) = A_aes · x⁻¹ + 0x63`;
//! - SM4: `x^8 + x^7 + x^6 + x^5 + x^4 + x^2 + 1`, and `S(x) = A · (A · x + 0xd3)⁻¹ + 0xd3`. GB/T
//!   32907-2016 and the IETF draft (draft-ribose-cfrg-sm4) print a table. This form is from F. Liu
//!   et al., "Analysis of the SMS4 Block Cipher" (2007), and a test below compares it with the
//!   table.
//!
//! All fields of 256 elements are isomorphic. With an isomorphism `φ` from SM4's to AES's field (it
//! sends `x` to a root of SM4's polynomial), `y⁻¹ = φ⁻¹(φ(y)⁻¹)`. Processors have the inversion on
//! the right in hardware: in `AESENCLAST` and in `GF2P8AFFINEINVQB`. M.-J. Saarinen's `sm4ni` and
//! libgcrypt compute SM4 in this way, one S-box at a time.
//!
//! # The field basis
//! This crate goes one step further. `A` and `φ` are linear, and so is `P = φ · A`. Except for the
//! S-box and the rotations of `L`, the cipher combines its words only by exclusive or. So the state
//! is kept as `P · x`, byte by byte ("in the field basis"), from the first round to the last. The
//! input map of the S-box disappears from the rounds (its constant goes into the round keys). The
//! output map is merged with `L`, which in bytes, most significant first, is
//!
//! ```text
//! L(s)ᵢ = (I + U) sᵢ + (U + D) sᵢ₊₁ + (U + D) sᵢ₊₂ + (I + D) sᵢ₊₃     U = "<< 2", D = ">> 6"
//! ```
//!
//! because `L(s) = s ⊕ s⋘2 ⊕ s⋘10 ⊕ s⋘18 ⊕ s⋘24` (and `(I+U) + (U+D) = I+D`). A round is then two
//! affine maps of the inverse, [`NEAR`] and [`FAR`], four byte shuffles and five exclusive ors.

/// A linear map of bytes over GF(2): column `i` is the image of `1 << i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Matrix([u8; 8]);

/// A linear map and a constant to add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Affine {
    pub(crate) matrix: Matrix,
    pub(crate) constant: u8,
}

const IDENTITY: Matrix = Matrix([1, 2, 4, 8, 16, 32, 64, 128]);

impl Matrix {
    pub(crate) const fn apply(self, x: u8) -> u8 {
        let (mut y, mut i) = (0, 0);
        while i < 8 {
            y ^= self.0[i] * (x >> i & 1);
            i += 1;
        }
        y
    }

    /// The composition: `first`, then `self`.
    const fn after(self, first: Self) -> Self {
        let (mut columns, mut i) = ([0; 8], 0);
        while i < 8 {
            columns[i] = self.apply(first.0[i]);
            i += 1;
        }
        Self(columns)
    }

    const fn plus(self, other: Self) -> Self {
        let (mut columns, mut i) = ([0; 8], 0);
        while i < 8 {
            columns[i] = self.0[i] ^ other.0[i];
            i += 1;
        }
        Self(columns)
    }

    /// The inverse: column `i` is the argument that `self` maps to `1 << i`. The loop tries all 256
    /// arguments.
    const fn inverse(self) -> Self {
        let (mut columns, mut x) = ([0; 8], 255);
        while x > 0 {
            let y = self.apply(x);
            if y.is_power_of_two() {
                columns[y.trailing_zeros() as usize] = x;
            }
            x -= 1;
        }
        Self(columns)
    }

    /// The rows: bit `j` of row `i` is set if bit `j` of the argument contributes to bit `i` of the
    /// result.
    pub(crate) const fn rows(self) -> [u8; 8] {
        let (mut rows, mut i) = ([0; 8], 0);
        while i < 64 {
            rows[i / 8] |= (self.0[i % 8] >> (i / 8) & 1) << (i % 8);
            i += 1;
        }
        rows
    }

    /// The form for `GF2P8AFFINEQB`: the row of bit `i` in byte `7 - i`.
    pub(crate) const fn gfni(self) -> u64 {
        u64::from_be_bytes(self.rows())
    }
}

impl Affine {
    const fn linear(matrix: Matrix) -> Self {
        Self { matrix, constant: 0 }
    }

    pub(crate) const fn apply(self, x: u8) -> u8 {
        self.matrix.apply(x) ^ self.constant
    }

    /// The map as two lookup tables for nibbles (`PSHUFB`): `low[x & 15] ^ high[x >> 4]`.
    pub(crate) const fn nibbles(self) -> [[u8; 16]; 2] {
        let (mut tables, mut x) = ([[0; 16]; 2], 0);
        while x < 16 {
            tables[0][x as usize] = self.apply(x);
            tables[1][x as usize] = self.matrix.apply(x << 4);
            x += 1;
        }
        tables
    }

    /// The linear part of [`Affine::after_aes`].
    pub(crate) const fn matrix_after_aes(self) -> Matrix {
        self.matrix.after(AES_OUTPUT.matrix.inverse())
    }

    /// The map that gives, for the output of the AES S-box, the same result as `self` for the
    /// inverse inside that S-box.
    pub(crate) const fn after_aes(self) -> Self {
        let matrix = self.matrix_after_aes();
        Self { matrix, constant: matrix.apply(AES_OUTPUT.constant) ^ self.constant }
    }
}

const AES_POLYNOMIAL: u16 = 0x11b;
const SM4_POLYNOMIAL: u16 = 0x1f5;

/// The product of two polynomials modulo a third.
const fn multiply(a: u8, b: u8, modulus: u16) -> u8 {
    let (mut product, mut i) = (0_u16, 8);
    while i > 0 {
        i -= 1;
        product <<= 1;
        product ^= (product >> 8) * modulus;
        product ^= a as u16 * (b >> i & 1) as u16;
    }
    product as u8
}

/// The circulant matrix: row `i` is the first row rotated by `i`.
const fn circulant(first_row: u8) -> Matrix {
    let (mut columns, mut i) = ([0; 8], 0);
    while i < 64 {
        columns[i % 8] |= (first_row.rotate_left(i as u32 / 8) >> (i % 8) & 1) << (i / 8);
        i += 1;
    }
    Matrix(columns)
}

/// φ: maps `x` to the smallest root of SM4's polynomial in AES's field, and the powers of `x` to
/// the powers of that root.
const fn isomorphism() -> Matrix {
    let mut root = 2;
    loop {
        let (mut columns, mut power, mut sum, mut i) = ([0; 8], 1, 0, 0);
        while i < 8 {
            columns[i] = power;
            sum ^= power * (SM4_POLYNOMIAL >> i & 1) as u8;
            power = multiply(power, root, AES_POLYNOMIAL);
            i += 1;
        }
        if sum ^ power == 0 {
            return Matrix(columns);
        }
        root += 1;
    }
}

/// `S_aes(x) = AES_OUTPUT(x⁻¹)`.
const AES_OUTPUT: Affine = Affine { matrix: circulant(0b1111_0001), constant: 0x63 };
const SM4_MATRIX: Matrix = circulant(0b1010_0111);
const SM4_CONSTANT: u8 = 0xd3;

/// U: a byte shifted left by two.
const UP: Matrix = Matrix([4, 8, 16, 32, 64, 128, 0, 0]);
/// D: a byte shifted right by six.
const DOWN: Matrix = Matrix([0, 0, 0, 0, 0, 0, 1, 2]);

/// P: into the field basis.
pub(crate) const TO_FIELD: Affine = Affine::linear(isomorphism().after(SM4_MATRIX));
/// P⁻¹: out of the field basis.
pub(crate) const FROM_FIELD: Affine = Affine::linear(TO_FIELD.matrix.inverse());
/// P, and the constant that the S-box adds to its input. Only round keys go through this map.
pub(crate) const KEY_TO_FIELD: Affine =
    Affine { matrix: TO_FIELD.matrix, constant: isomorphism().apply(SM4_CONSTANT) };

/// From the inverse in AES's field to the output of SM4's S-box, outside of the field basis.
pub(crate) const OUTPUT: Affine =
    Affine { matrix: SM4_MATRIX.after(isomorphism().inverse()), constant: SM4_CONSTANT };

/// The contribution of the inverse of byte `i` to byte `i` of the new word, in the field basis. Its
/// contribution to byte `i - 3` is `NEAR + FAR`.
pub(crate) const NEAR: Affine =
    Affine::linear(TO_FIELD.matrix.after(IDENTITY.plus(UP)).after(OUTPUT.matrix));

/// The contribution to the bytes `i - 1` and `i - 2`. A byte receives `FAR` three times and `NEAR`
/// twice, so the constant of `FAR` is the constant of the round: P times L of the word with the
/// S-box's constant in each byte. That L is the byte rotated by two.
pub(crate) const FAR: Affine = Affine {
    matrix: TO_FIELD.matrix.after(UP.plus(DOWN)).after(OUTPUT.matrix),
    constant: TO_FIELD.matrix.apply(SM4_CONSTANT.rotate_left(2)),
};

/// Inversion in AES's field, for tests and for software that emulates the hardware. It is a table,
/// because Miri is slow.
#[cfg(test)]
pub(crate) fn aes_inverse(x: u8) -> u8 {
    /// The polynomial `x + 1` generates the field, so its powers `i` and `255 - i` are inverse to
    /// each other.
    static INVERSES: [u8; 256] = {
        let (mut powers, mut inverses, mut i) = ([1; 256], [0; 256], 1);
        while i < 256 {
            powers[i] = multiply(powers[i - 1], 3, AES_POLYNOMIAL);
            i += 1;
        }
        while i > 0 {
            i -= 1;
            inverses[powers[i] as usize] = powers[255 - i];
        }
        inverses
    };
    INVERSES[x as usize]
}

#[cfg(test)]
pub(crate) fn aes_sbox(x: u8) -> u8 {
    AES_OUTPUT.apply(aes_inverse(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// GB/T 32907-2016, section 6.2, table 1 (draft-ribose-cfrg-sm4-10, section 6.2.1, figure 1).
    #[rustfmt::skip]
    const SBOX: [u8; 256] = [
        0xd6, 0x90, 0xe9, 0xfe, 0xcc, 0xe1, 0x3d, 0xb7, 0x16, 0xb6, 0x14, 0xc2, 0x28, 0xfb, 0x2c, 0x05,
        0x2b, 0x67, 0x9a, 0x76, 0x2a, 0xbe, 0x04, 0xc3, 0xaa, 0x44, 0x13, 0x26, 0x49, 0x86, 0x06, 0x99,
        0x9c, 0x42, 0x50, 0xf4, 0x91, 0xef, 0x98, 0x7a, 0x33, 0x54, 0x0b, 0x43, 0xed, 0xcf, 0xac, 0x62,
        0xe4, 0xb3, 0x1c, 0xa9, 0xc9, 0x08, 0xe8, 0x95, 0x80, 0xdf, 0x94, 0xfa, 0x75, 0x8f, 0x3f, 0xa6,
        0x47, 0x07, 0xa7, 0xfc, 0xf3, 0x73, 0x17, 0xba, 0x83, 0x59, 0x3c, 0x19, 0xe6, 0x85, 0x4f, 0xa8,
        0x68, 0x6b, 0x81, 0xb2, 0x71, 0x64, 0xda, 0x8b, 0xf8, 0xeb, 0x0f, 0x4b, 0x70, 0x56, 0x9d, 0x35,
        0x1e, 0x24, 0x0e, 0x5e, 0x63, 0x58, 0xd1, 0xa2, 0x25, 0x22, 0x7c, 0x3b, 0x01, 0x21, 0x78, 0x87,
        0xd4, 0x00, 0x46, 0x57, 0x9f, 0xd3, 0x27, 0x52, 0x4c, 0x36, 0x02, 0xe7, 0xa0, 0xc4, 0xc8, 0x9e,
        0xea, 0xbf, 0x8a, 0xd2, 0x40, 0xc7, 0x38, 0xb5, 0xa3, 0xf7, 0xf2, 0xce, 0xf9, 0x61, 0x15, 0xa1,
        0xe0, 0xae, 0x5d, 0xa4, 0x9b, 0x34, 0x1a, 0x55, 0xad, 0x93, 0x32, 0x30, 0xf5, 0x8c, 0xb1, 0xe3,
        0x1d, 0xf6, 0xe2, 0x2e, 0x82, 0x66, 0xca, 0x60, 0xc0, 0x29, 0x23, 0xab, 0x0d, 0x53, 0x4e, 0x6f,
        0xd5, 0xdb, 0x37, 0x45, 0xde, 0xfd, 0x8e, 0x2f, 0x03, 0xff, 0x6a, 0x72, 0x6d, 0x6c, 0x5b, 0x51,
        0x8d, 0x1b, 0xaf, 0x92, 0xbb, 0xdd, 0xbc, 0x7f, 0x11, 0xd9, 0x5c, 0x41, 0x1f, 0x10, 0x5a, 0xd8,
        0x0a, 0xc1, 0x31, 0x88, 0xa5, 0xcd, 0x7b, 0xbd, 0x2d, 0x74, 0xd0, 0x12, 0xb8, 0xe5, 0xb4, 0xb0,
        0x89, 0x69, 0x97, 0x4a, 0x0c, 0x96, 0x77, 0x7e, 0x65, 0xb9, 0xf1, 0x09, 0xc5, 0x6e, 0xc6, 0x84,
        0x18, 0xf0, 0x7d, 0xec, 0x3a, 0xdc, 0x4d, 0x20, 0x79, 0xee, 0x5f, 0x3e, 0xd7, 0xcb, 0x39, 0x48,
    ];

    fn sbox(x: u8) -> u8 {
        OUTPUT.apply(aes_inverse(KEY_TO_FIELD.apply(x)))
    }

    #[test]
    fn the_sbox_is_the_standards() {
        for x in 0..=255 {
            assert_eq!(sbox(x), SBOX[x as usize], "{x:#04x}");
        }
    }

    #[test]
    fn inverses_are_inverse() {
        assert_eq!(aes_inverse(0), 0);
        for x in 1..=255 {
            assert_eq!(multiply(x, aes_inverse(x), AES_POLYNOMIAL), 1);
        }
    }

    #[test]
    fn the_aes_sbox_is_that_of_fips_197() {
        for (x, y) in [(0x00, 0x63), (0x01, 0x7c), (0x53, 0xed), (0xff, 0x16)] {
            assert_eq!(aes_sbox(x), y);
        }
    }

    #[test]
    fn the_isomorphism_respects_both_operations() {
        let phi = isomorphism();
        for a in 0..=255 {
            for b in (0..=255).step_by(if cfg!(miri) { 51 } else { 1 }) {
                assert_eq!(
                    phi.apply(multiply(a, b, SM4_POLYNOMIAL)),
                    multiply(phi.apply(a), phi.apply(b), AES_POLYNOMIAL)
                );
            }
        }
    }

    #[test]
    fn inverses_and_nibble_tables() {
        for map in [
            TO_FIELD,
            FROM_FIELD,
            KEY_TO_FIELD,
            OUTPUT.after_aes(),
            NEAR.after_aes(),
            FAR.after_aes(),
        ] {
            let [low, high] = map.nibbles();
            for x in 0..=255_u8 {
                assert_eq!(low[x as usize & 15] ^ high[x as usize >> 4], map.apply(x));
            }
        }
        for x in 0..=255 {
            assert_eq!(FROM_FIELD.apply(TO_FIELD.apply(x)), x);
            assert_eq!(OUTPUT.after_aes().apply(aes_sbox(x)), OUTPUT.apply(aes_inverse(x)));
        }
    }

    /// T of a round, word by word, against its definition by the table.
    #[test]
    fn near_and_far_are_the_sbox_and_l() {
        let mut word = 0x0123_4567_u32;
        for _ in 0..if cfg!(miri) { 100 } else { 10_000 } {
            word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let s = u32::from_be_bytes(word.to_be_bytes().map(|x| SBOX[x as usize]));
            let expected =
                s ^ s.rotate_left(2) ^ s.rotate_left(10) ^ s.rotate_left(18) ^ s.rotate_left(24);
            let inverse = word.to_be_bytes().map(|x| aes_inverse(KEY_TO_FIELD.apply(x)));
            let near = inverse.map(|x| NEAR.apply(x));
            let far = inverse.map(|x| FAR.apply(x));
            for i in 0..4 {
                let byte = |bytes: [u8; 4], k| bytes[(i + k) % 4];
                let sum =
                    byte(near, 0) ^ byte(far, 1) ^ byte(far, 2) ^ byte(near, 3) ^ byte(far, 3);
                assert_eq!(FROM_FIELD.apply(sum), expected.to_be_bytes()[i]);
            }
        }
    }
}

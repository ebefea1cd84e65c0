//! Constants for the vectors, a lane of 128 bits each.

use crate::field::{FAR, FROM_FIELD, NEAR, TO_FIELD};

pub(super) type Lane = [u8; 16];

/// For `PSHUFB`: the nibble tables of an affine map.
pub(super) const TO_FIELD_NIBBLES: [Lane; 2] = TO_FIELD.nibbles();
pub(super) const FROM_FIELD_NIBBLES: [Lane; 2] = FROM_FIELD.nibbles();
/// For the output of `AESENCLAST` with a round key of zero, which is the AES S-box.
pub(super) const NEAR_NIBBLES: [Lane; 2] = NEAR.after_aes().nibbles();
pub(super) const FAR_NIBBLES: [Lane; 2] = FAR.after_aes().nibbles();

/// For `PSHUFB`: reverses the bytes of each word.
pub(super) const SWAP_BYTES: Lane = {
    let (mut table, mut i) = ([0; 16], 0);
    while i < 16 {
        table[i] = (i ^ 3) as u8;
        i += 1;
    }
    table
};

/// For `PSHUFB`: replaces each byte by the byte `bytes` further on in its word.
const fn turn(bytes: usize) -> Lane {
    let (mut table, mut i) = ([0; 16], 0);
    while i < 16 {
        table[i] = (i / 4 * 4 + (i + bytes) % 4) as u8;
        i += 1;
    }
    table
}

/// The same after `AESENCLAST`. Its ShiftRows (FIPS 197, section 5.1.2) has moved byte `r` of word
/// `c` to word `c - r`.
const fn turn_after_aes(bytes: usize) -> Lane {
    let (mut table, mut i) = (turn(bytes), 0);
    while i < 16 {
        let (word, row) = (table[i] / 4, table[i] % 4);
        table[i] = (word + 4 - row) % 4 * 4 + row;
        i += 1;
    }
    table
}

/// For [`Vector::turn`](crate::simd::Vector::turn): the tables for 0 to 3 bytes.
pub(super) const TURNS: [Lane; 4] = [turn(0), turn(1), turn(2), turn(3)];
pub(super) const TURNS_AFTER_AES: [Lane; 4] =
    [turn_after_aes(0), turn_after_aes(1), turn_after_aes(2), turn_after_aes(3)];

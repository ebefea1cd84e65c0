//! The encryption context as bytes, for backends that authenticate the context themselves.

use super::EncryptionContext;

/// The head of a wrapped key, followed by the context in its only encoding: a count (u32), and for
/// each name and value, in the order of the names, the length (u32) and the bytes. All numbers are
/// little-endian.
pub(super) fn associated_data(head: &[u8], context: &EncryptionContext) -> Vec<u8> {
    fn put(out: &mut Vec<u8>, len: usize, bytes: &str) {
        out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(bytes.as_bytes());
    }
    let mut out = head.to_vec();
    put(&mut out, context.len(), "");
    for text in context.iter().flat_map(|(name, value)| [name, value]) {
        put(&mut out, text.len(), text);
    }
    out
}

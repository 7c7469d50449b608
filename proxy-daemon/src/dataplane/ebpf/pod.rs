//! Structs of the maps as bytes, and back.

use aya::Pod;

/// As the kernel takes them: one after the other.
#[allow(unsafe_code, reason = "what Pod is for")]
pub fn bytes<T: Pod>(values: &[T]) -> &[u8] {
    // SAFETY: `Pod` promises that there is no padding, so every byte is initialised; the length
    // is that of the slice, and any byte may stand anywhere.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// As the kernel gave them; a rest that is shorter than one is none.
#[allow(unsafe_code, reason = "what Pod is for")]
pub fn values<T: Pod>(bytes: &[u8]) -> impl Iterator<Item = T> + '_ {
    bytes.chunks_exact(size_of::<T>()).map(|chunk| {
        // SAFETY: the chunk is as long as `T`, and `Pod` promises that any bytes make one.
        unsafe { chunk.as_ptr().cast::<T>().read_unaligned() }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let all = [1_u64, 2 << 40, u64::MAX];
        assert_eq!(bytes(&all).len(), 24);
        let odd = [&[0], bytes(&all), &[7; 3]].concat();
        assert_eq!(values::<u64>(&odd[1..]).collect::<Vec<_>>(), all);
    }
}

//! Values that every CPU has its own of, as a batch gives them. aya reads entry by entry.

use aya::Pod;

/// The struct that the bytes are; `None` when they are too few.
#[allow(unsafe_code, reason = "bytes from the kernel are read as what it keeps there")]
pub fn from_bytes<T: Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: long enough, no alignment is asked for, and any bytes are a `Pod`.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Over all CPUs.
pub fn sum<T: Pod + Default + std::ops::AddAssign>(value: &[u8]) -> T {
    let each = value.chunks(size_of::<T>().next_multiple_of(8));
    each.filter_map(from_bytes::<T>).fold(T::default(), |mut total, one| {
        total += one;
        total
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_cpus_are_padded_and_added_up() {
        let bytes: Vec<u8> =
            [1_u32, 77, 2, 77].iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(sum::<u32>(&bytes), 3);
        assert_eq!(from_bytes::<u64>(&bytes[..7]), None);
    }
}

//! Copies that leave the caches to others.

/// From here on a copy fills a usual core's second-level cache.
#[cfg(target_arch = "x86_64")]
const LEAST_BYTES: usize = 2 << 20;

/// `to = from`, of equal length. Much is written past the caches: what is not read again soon would only displace what
/// peers are about to read.
pub(crate) fn copy(from: &[u8], to: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if to.len() >= LEAST_BYTES {
        return copy_past_caches(from, to);
    }
    to.copy_from_slice(from);
}

#[cfg(target_arch = "x86_64")]
fn copy_past_caches(from: &[u8], to: &mut [u8]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    assert_eq!(from.len(), to.len());
    // SAFETY: any bytes are a vector.
    let (head, vectors, tail) = unsafe { to.align_to_mut::<__m128i>() };
    let (first, rest) = from.split_at(head.len());
    let (middle, last) = rest.split_at(size_of_val(vectors));
    head.copy_from_slice(first);
    for (vector, bytes) in vectors.iter_mut().zip(middle.as_chunks::<16>().0) {
        // SAFETY: 16 bytes are read at any alignment; the vector is aligned and exclusively borrowed.
        unsafe { _mm_stream_si128(vector, _mm_loadu_si128(bytes.as_ptr().cast())) };
    }
    tail.copy_from_slice(last);
    // Streamed stores are not ordered with those that tell others of them.
    // SAFETY: a fence touches no memory.
    unsafe { _mm_sfence() };
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn copies_are_whole_at_every_alignment() {
        let from: Vec<u8> = (0..LEAST_BYTES + 64).map(|i| (i % 251) as u8).collect();
        for (len, from_at, to_at) in [
            (0, 0, 0),
            (LEAST_BYTES - 1, 3, 1),
            (LEAST_BYTES, 0, 0),
            (LEAST_BYTES, 1, 0),
            (LEAST_BYTES + 17, 5, 7),
            (LEAST_BYTES + 33, 0, 15),
        ] {
            let mut to = vec![0; to_at + len + 1];
            copy(&from[from_at..][..len], &mut to[to_at..][..len]);
            assert_eq!(to[to_at..][..len], from[from_at..][..len], "{len} to {to_at}");
            assert!(
                to[..to_at].iter().chain(to.last()).all(|&byte| byte == 0),
                "beyond the copy"
            );
        }
    }
}

//! K and V of one layer in blocks.
//!
//! Attention multiplies eight positions at a time with one value of a query, so a block keeps the K of eight positions
//! interleaved: `[kv head][block_size / 8][head_dim][8 positions]`. V is weighted by position and summed by dimension:
//! `[kv head][block_size][head_dim, padded to 8]`. All K blocks come first, then all V blocks, then the scales of element
//! types that have them: `[block][kv head][K, V][block_size]`.

mod store;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

pub(crate) use self::store::reshape_and_cache;
use super::exec::check;
use super::memory::{Pages, Region};
use super::simd::{LANES, Pair, Simd};
use crate::{E4m3, Heads, KernelError, KvSpec, Result};

/// K and V of one layer.
pub struct CpuKvCache {
    spec: KvSpec,
    memory: Region,
}

/// An element type of the cache.
///
/// # Safety
/// Every bit pattern is a value, and the alignment is at most [`super::memory::ALIGN`].
pub(crate) unsafe trait KvElement: Copy + Send + Sync {
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::F32;
    #[inline(always)]
    fn load_pair<S: Simd>(simd: S, first: &[Self; LANES], second: &[Self; LANES]) -> Pair<S> {
        simd.join(Self::load(simd, first), Self::load(simd, second))
    }
    /// Rounds to nearest, ties to even; E4M3 saturates. Slices of equal length. Returns what the elements are to be
    /// multiplied with.
    fn convert(from: &[f32], to: &mut [Self]) -> f32;
    const ZERO: Self;
    /// Whether rows have scales; otherwise they are 1.
    const SCALED: bool = false;
}

// SAFETY: plain floats.
unsafe impl KvElement for f32 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[f32; LANES]) -> S::F32 {
        simd.load(from)
    }
    #[inline(always)]
    fn convert(from: &[f32], to: &mut [f32]) -> f32 {
        to.copy_from_slice(from);
        1.0
    }
    const ZERO: f32 = 0.0;
}

// SAFETY: a transparent u16.
unsafe impl KvElement for f16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[f16; LANES]) -> S::F32 {
        simd.load_f16(from)
    }
    #[inline(always)]
    fn load_pair<S: Simd>(simd: S, first: &[f16; LANES], second: &[f16; LANES]) -> Pair<S> {
        simd.load_f16_pair(first, second)
    }
    #[inline(always)]
    fn convert(from: &[f32], to: &mut [f16]) -> f32 {
        to.convert_from_f32_slice(from);
        1.0
    }
    const ZERO: f16 = f16::ZERO;
}

// SAFETY: a transparent u16.
unsafe impl KvElement for bf16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[bf16; LANES]) -> S::F32 {
        simd.load_bf16(from)
    }
    #[inline(always)]
    fn convert(from: &[f32], to: &mut [bf16]) -> f32 {
        to.convert_from_f32_slice(from);
        1.0
    }
    const ZERO: bf16 = bf16::ZERO;
}

// SAFETY: a transparent u8.
unsafe impl KvElement for E4m3 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[E4m3; LANES]) -> S::F32 {
        simd.load_e4m3(from)
    }
    #[inline(always)]
    fn convert(from: &[f32], to: &mut [E4m3]) -> f32 {
        for (to, &value) in to.iter_mut().zip(from) {
            *to = E4m3::from_f32(value);
        }
        1.0
    }
    const ZERO: E4m3 = E4m3::ZERO;
}

// SAFETY: a plain integer.
unsafe impl KvElement for i8 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[i8; LANES]) -> S::F32 {
        simd.load_i8(from)
    }
    /// The largest magnitude becomes 127.
    #[inline(always)]
    fn convert(from: &[f32], to: &mut [i8]) -> f32 {
        let largest = largest_magnitude(from);
        let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        for (to, &value) in to.iter_mut().zip(from) {
            *to = (value * factor).round_ties_even() as i8;
        }
        largest / 127.0
    }
    const ZERO: i8 = 0;
    const SCALED: bool = true;
}

/// Lane by lane, so that comparisons need not wait for each other.
#[inline(always)]
fn largest_magnitude(values: &[f32]) -> f32 {
    let (vectors, tail) = values.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for vector in vectors {
        for (largest, x) in lanes.iter_mut().zip(vector) {
            *largest = largest.max(x.abs());
        }
    }
    let mut largest = 0.0f32;
    for x in lanes.iter().chain(tail) {
        largest = largest.max(x.abs());
    }
    largest
}

/// Where a cache's elements are.
#[derive(Clone, Copy)]
pub(crate) struct KvLayout {
    spec: KvSpec,
}

impl KvLayout {
    /// Vectors of a row of V.
    pub(crate) fn v_vectors(&self) -> usize {
        self.spec.head_dim.div_ceil(LANES)
    }
    fn k_head(&self) -> usize {
        self.spec.block_size * self.spec.head_dim
    }
    fn v_head(&self) -> usize {
        self.spec.block_size * self.v_vectors() * LANES
    }
    /// Elements of all of K.
    fn k_len(&self) -> usize {
        self.spec.num_blocks * self.spec.num_kv_heads * self.k_head()
    }
    /// First element of the K of eight positions: `[head_dim][8]`.
    fn k_group(&self, block: usize, head: usize, group: usize) -> usize {
        (block * self.spec.num_kv_heads + head) * self.k_head() + group * LANES * self.spec.head_dim
    }
    /// First element of the V of eight positions: `[8][head_dim, padded]`.
    fn v_group(&self, block: usize, head: usize, group: usize) -> usize {
        self.k_len()
            + (block * self.spec.num_kv_heads + head) * self.v_head()
            + group * LANES * self.v_vectors() * LANES
    }
    /// First scale of the K (of the V) of a head's positions in a block.
    fn scales(&self, block: usize, head: usize, of_v: bool) -> usize {
        ((block * self.spec.num_kv_heads + head) * 2 + usize::from(of_v)) * self.spec.block_size
    }
    /// Bytes of elements and scales, if they can be counted.
    fn bytes(&self) -> Option<usize> {
        let dtype = self.spec.dtype;
        let factors = [
            self.spec.num_blocks,
            self.spec.num_kv_heads,
            self.spec.block_size,
            2,
        ];
        let scales = factors
            .into_iter()
            .try_fold(dtype.scale_bytes(), usize::checked_mul)?;
        self.len()?.checked_mul(dtype.bytes())?.checked_add(scales)
    }
    /// Elements of K and V together, if they can be counted.
    fn len(&self) -> Option<usize> {
        let row = self
            .spec
            .head_dim
            .checked_add(self.spec.head_dim.checked_next_multiple_of(LANES)?)?;
        let factors = [self.spec.num_blocks, self.spec.num_kv_heads, self.spec.block_size];
        factors.into_iter().try_fold(row, usize::checked_mul)
    }
}

/// K and V of eight consecutive positions and one head.
#[derive(Clone, Copy)]
pub(crate) struct KvGroup<'a, E> {
    /// `head_dim` vectors of eight positions.
    pub(crate) k: &'a [[E; LANES]],
    /// Eight rows of `v_vectors` vectors.
    pub(crate) v: &'a [[E; LANES]],
    /// Of the eight positions, where elements have scales.
    pub(crate) k_scales: &'a [f32; LANES],
    pub(crate) v_scales: &'a [f32; LANES],
}

impl<E> KvGroup<'_, E> {
    /// Of no positions.
    pub(crate) const EMPTY: Self = Self {
        k: &[],
        v: &[],
        k_scales: &ONES,
        v_scales: &ONES,
    };
}

const ONES: [f32; LANES] = [1.0; LANES];

impl CpuKvCache {
    /// Zeroed; memory that is never written costs nothing.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if `block_size` is not a multiple of 8, [`KernelError::OutOfMemory`].
    pub(crate) fn new(spec: KvSpec) -> Result<Self> {
        check(
            "kv_cache",
            spec.block_size > 0 && spec.block_size.is_multiple_of(LANES),
            || format!("block_size {} is not a multiple of {LANES}", spec.block_size),
        )?;
        let layout = KvLayout { spec };
        let bytes = layout.bytes().ok_or(KernelError::OutOfMemory {
            what: "KV cache",
            requested: usize::MAX,
            free: 0,
        })?;
        Ok(Self {
            spec,
            memory: Region::zeroed(bytes, Pages::Small, "KV cache")?,
        })
    }

    pub fn spec(&self) -> KvSpec {
        self.spec
    }

    /// Bytes of K and V.
    pub fn bytes(&self) -> usize {
        self.memory.as_slice().len()
    }

    pub(crate) fn layout(&self) -> KvLayout {
        KvLayout { spec: self.spec }
    }

    pub(crate) fn elements<E: KvElement>(&self) -> Elements<'_, E> {
        let layout = self.layout();
        let bytes = self.memory.as_slice();
        assert_eq!(size_of::<E>(), self.spec.dtype.bytes());
        let elements = layout.len().unwrap_or(0);
        let (values, scales) = bytes.split_at(elements * size_of::<E>());
        // SAFETY: the region's alignment suffices, and every bit pattern is a value (`KvElement`).
        let values = unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), elements) };
        // SAFETY: elements are a multiple of eight, so this is aligned, and every bit pattern is an f32.
        let scales = unsafe { std::slice::from_raw_parts(scales.as_ptr().cast(), scales.len() / 4) };
        Elements {
            values,
            scales,
            layout,
        }
    }

    /// An error unless `heads` are the cache's.
    pub(crate) fn check_heads(&self, op: &'static str, heads: &Heads) -> Result<()> {
        let same = heads.num_kv == self.spec.num_kv_heads && heads.head_dim == self.spec.head_dim;
        check(op, same, || {
            format!(
                "{} heads of {} and a cache for {} of {}",
                heads.num_kv, heads.head_dim, self.spec.num_kv_heads, self.spec.head_dim
            )
        })
    }
}

/// A cache seen as its element type.
#[derive(Clone, Copy)]
pub(crate) struct Elements<'a, E> {
    values: &'a [E],
    /// Empty without scales.
    scales: &'a [f32],
    pub(crate) layout: KvLayout,
}

impl<'a, E: KvElement> Elements<'a, E> {
    /// Positions `8 * group..` of a block.
    #[inline(always)]
    pub(crate) fn group(&self, block: usize, head: usize, group: usize) -> KvGroup<'a, E> {
        let (head_dim, v_vectors) = (self.layout.spec.head_dim, self.layout.v_vectors());
        let k = &self.values[self.layout.k_group(block, head, group)..][..head_dim * LANES];
        let v = &self.values[self.layout.v_group(block, head, group)..][..LANES * v_vectors * LANES];
        let scales = |of_v| {
            if E::SCALED {
                let first = self.layout.scales(block, head, of_v) + group * LANES;
                &self.scales[first..].as_chunks().0[0]
            } else {
                &ONES
            }
        };
        KvGroup {
            k: k.as_chunks().0,
            v: v.as_chunks().0,
            k_scales: scales(false),
            v_scales: scales(true),
        }
    }
}

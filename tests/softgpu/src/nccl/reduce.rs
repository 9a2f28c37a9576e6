//! Element types of messages and their reductions. Ranks are added in their order; what is narrower than f32 is summed
//! in f32 and rounded once.

use half::{bf16, f16};
use libc::c_int;

/// `ncclDataType_t`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum DataType {
    I8,
    U8,
    I32,
    U32,
    I64,
    U64,
    F16,
    F32,
    F64,
    Bf16,
    /// Two formats of 8 bits, which can be moved and not reduced.
    F8,
}

impl DataType {
    pub(super) fn of(number: c_int) -> Option<Self> {
        Some(match number {
            0 => Self::I8,
            1 => Self::U8,
            2 => Self::I32,
            3 => Self::U32,
            4 => Self::I64,
            5 => Self::U64,
            6 => Self::F16,
            7 => Self::F32,
            8 => Self::F64,
            9 => Self::Bf16,
            10 | 11 => Self::F8,
            _ => return None,
        })
    }

    pub(super) fn bytes(self) -> usize {
        match self {
            Self::I8 | Self::U8 | Self::F8 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::I64 | Self::U64 | Self::F64 => 8,
        }
    }
}

/// `ncclRedOp_t`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reduction {
    Sum,
    Product,
    Max,
    Min,
    Average,
}

impl Reduction {
    pub(super) fn of(number: c_int) -> Option<Self> {
        Some(match number {
            0 => Self::Sum,
            1 => Self::Product,
            2 => Self::Max,
            3 => Self::Min,
            4 => Self::Average,
            _ => return None,
        })
    }
}

/// A number in which a reduction is carried out.
trait Number: Copy {
    fn plus(self, other: Self) -> Self;
    fn times(self, other: Self) -> Self;
    fn max_of(self, other: Self) -> Self;
    fn min_of(self, other: Self) -> Self;
    fn divide(self, count: usize) -> Self;

    fn combine(self, other: Self, reduction: Reduction) -> Self {
        match reduction {
            Reduction::Sum | Reduction::Average => self.plus(other),
            Reduction::Product => self.times(other),
            Reduction::Max => self.max_of(other),
            Reduction::Min => self.min_of(other),
        }
    }
}

/// An element of a message.
trait Element: Copy {
    type Wide: Number;
    fn widen(self) -> Self::Wide;
    fn narrow(wide: Self::Wide) -> Self;
}

macro_rules! numbers {
    ($plus:ident, $times:ident: $($type:ty),*) => { $(
        impl Number for $type {
            fn plus(self, other: Self) -> Self { self.$plus(other) }
            fn times(self, other: Self) -> Self { self.$times(other) }
            fn max_of(self, other: Self) -> Self { self.max(other) }
            fn min_of(self, other: Self) -> Self { self.min(other) }
            fn divide(self, count: usize) -> Self { self / count as $type }
        }
        impl Element for $type {
            type Wide = $type;
            fn widen(self) -> Self { self }
            fn narrow(wide: Self) -> Self { wide }
        }
    )* };
}

use std::ops::{Add, Mul};
numbers!(wrapping_add, wrapping_mul: i8, u8, i32, u32, i64, u64);
numbers!(add, mul: f32, f64);

macro_rules! narrow_floats {
    ($($type:ty),*) => { $(
        impl Element for $type {
            type Wide = f32;
            fn widen(self) -> f32 { self.to_f32() }
            fn narrow(wide: f32) -> Self { Self::from_f32(wide) }
        }
    )* };
}
narrow_floats!(f16, bf16);

/// Reduces `count` elements of each of `sources`, from element `from`, into `target`.
///
/// # Safety
/// The elements lie in memory that nobody writes meanwhile, those of the target in memory that nobody else uses.
pub(super) unsafe fn reduce(
    (data_type, reduction): (DataType, Reduction),
    target: usize,
    sources: &[usize],
    from: usize,
    count: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match data_type {
            DataType::I8 => reduce_of::<i8>(reduction, target, sources, from, count),
            DataType::U8 | DataType::F8 => reduce_of::<u8>(reduction, target, sources, from, count),
            DataType::I32 => reduce_of::<i32>(reduction, target, sources, from, count),
            DataType::U32 => reduce_of::<u32>(reduction, target, sources, from, count),
            DataType::I64 => reduce_of::<i64>(reduction, target, sources, from, count),
            DataType::U64 => reduce_of::<u64>(reduction, target, sources, from, count),
            DataType::F16 => reduce_of::<f16>(reduction, target, sources, from, count),
            DataType::F32 => reduce_of::<f32>(reduction, target, sources, from, count),
            DataType::F64 => reduce_of::<f64>(reduction, target, sources, from, count),
            DataType::Bf16 => reduce_of::<bf16>(reduction, target, sources, from, count),
        }
    }
}

/// # Safety
/// As [`reduce`].
unsafe fn reduce_of<T: Element>(
    reduction: Reduction,
    target: usize,
    sources: &[usize],
    from: usize,
    count: usize,
) {
    // SAFETY: the caller's promise; unaligned accesses, because a buffer may begin anywhere.
    let read = |source: usize, i: usize| unsafe { (source as *const T).add(i).read_unaligned() }.widen();
    let Some((first, others)) = sources.split_first() else {
        return;
    };
    for i in 0..count {
        let mut sum = read(*first, from + i);
        for source in others {
            sum = sum.combine(read(*source, from + i), reduction);
        }
        if reduction == Reduction::Average {
            sum = sum.divide(sources.len());
        }
        // SAFETY: the caller's promise.
        unsafe { (target as *mut T).add(i).write_unaligned(T::narrow(sum)) };
    }
}

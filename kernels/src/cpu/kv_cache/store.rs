//! The op that writes K and V to a cache.

use half::{bf16, f16};
use phalanx_model::KvDtype;

use super::super::batch::CpuBatch;
use super::super::buffer::CpuBuffer;
use super::super::exec::Exec;
use super::super::simd::{Kernel, LANES, Simd};
use super::{CpuKvCache, KvElement, KvLayout};
use crate::{E4m3, Heads, Result};

/// Writes the k and v heads of `qkv` to the batch's slots.
pub(crate) fn reshape_and_cache(
    exec: Exec<'_>,
    kv: &mut CpuKvCache,
    qkv: &CpuBuffer,
    heads: &Heads,
    batch: &CpuBatch,
) -> Result<()> {
    const OP: &str = "reshape_and_cache";
    let slots = &batch.input().slot_mapping;
    kv.check_heads(OP, heads)?;
    qkv.check(OP, slots.len(), heads.qkv_width())?;
    batch
        .checked()
        .check_slots(OP, kv.spec.num_blocks * kv.spec.block_size)?;
    let layout = kv.layout();
    let store = Store {
        qkv,
        heads,
        slots,
        layout,
    };
    let memory = kv.memory.as_mut_slice().as_mut_ptr();
    match kv.spec.dtype {
        KvDtype::F32 => store.run::<f32>(exec, memory),
        KvDtype::F16 => store.run::<f16>(exec, memory),
        KvDtype::BF16 => store.run::<bf16>(exec, memory),
        KvDtype::E4M3 => store.run::<E4m3>(exec, memory),
        KvDtype::INT8 => store.run::<i8>(exec, memory),
    }
    Ok(())
}

struct Store<'a> {
    qkv: &'a CpuBuffer,
    heads: &'a Heads,
    slots: &'a [u32],
    layout: KvLayout,
}

struct SendPtr<E>(*mut E);
// SAFETY: the tasks of `Store::run` write disjoint elements through it.
unsafe impl<E: Send> Sync for SendPtr<E> {}

impl<E> SendPtr<E> {
    fn at(&self, index: usize) -> *mut E {
        self.0.wrapping_add(index)
    }
}

impl Store<'_> {
    /// One task per head of K and per head of V: their elements are disjoint whatever the slots are.
    fn run<E: KvElement>(&self, exec: Exec<'_>, memory: *mut u8) {
        let scales = SendPtr(
            memory
                .wrapping_add(self.layout.len().unwrap_or(0) * size_of::<E>())
                .cast::<f32>(),
        );
        let memory = SendPtr(memory.cast::<E>());
        let num_kv = self.heads.num_kv;
        exec.pool.run(2 * num_kv, |task| {
            exec.isa.run(StoreHead {
                store: self,
                memory: &memory,
                scales: &scales,
                head: task % num_kv,
                of_v: task >= num_kv,
            });
        });
    }
}

/// The rows of one head of K or of V.
struct StoreHead<'a, E> {
    store: &'a Store<'a>,
    memory: &'a SendPtr<E>,
    scales: &'a SendPtr<f32>,
    head: usize,
    of_v: bool,
}

impl<E: KvElement> Kernel for StoreHead<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (slots, head_dim) = (self.store.slots, self.store.heads.head_dim);
        let mut converted = vec![E::ZERO; LANES * head_dim];
        let mut shuffled = converted.clone();
        let mut row = 0;
        while row < slots.len() {
            let group = !self.of_v && fill_a_group(&slots[row..]);
            let rows = if group { LANES } else { 1 };
            for i in 0..rows {
                self.convert(simd, row + i, &mut converted[i * head_dim..][..head_dim]);
            }
            let slot = slots[row] as usize;
            if group {
                self.store_k_group(slot, &mut converted, &mut shuffled);
            } else if self.of_v {
                self.store_v(slot, &converted[..head_dim]);
            } else {
                self.store_k(slot, &converted[..head_dim]);
            }
            row += rows;
        }
    }
}

/// Whether the first slots are those of eight positions that lie interleaved.
fn fill_a_group(slots: &[u32]) -> bool {
    let Some(group) = slots.first_chunk::<LANES>() else {
        return false;
    };
    let first = group[0] as usize;
    first.is_multiple_of(LANES) && (first..).zip(group).all(|(slot, &own)| slot == own as usize)
}

/// Rotates the bits of the elements' indices: the halves of `from` alternate in `to`. Loops of this kind become
/// instructions that interleave vectors.
#[inline(always)]
fn shuffle<E: Copy>(from: &[E], to: &mut [E]) {
    let (first, second) = from.split_at(from.len() / 2);
    for ((to, &a), &b) in to.as_chunks_mut::<2>().0.iter_mut().zip(first).zip(second) {
        *to = [a, b];
    }
}

impl<E: KvElement> StoreHead<'_, E> {
    /// The head's values in a row of `qkv`.
    #[inline(always)]
    fn values(&self, row: usize) -> &[f32] {
        let Heads {
            num_q,
            num_kv,
            head_dim,
            ..
        } = *self.store.heads;
        let head = num_q + self.head + if self.of_v { num_kv } else { 0 };
        &self.store.qkv.row(row)[head * head_dim..][..head_dim]
    }

    /// Converts the values of a row, and stores their scale.
    #[inline(always)]
    fn convert<S: Simd>(&self, simd: S, row: usize, to: &mut [E]) {
        // A head's part of a row is too short for the processor to foresee where the next one lies.
        if row + LANES < self.store.slots.len() {
            simd.prefetch(self.values(row + LANES));
        }
        let scale = E::convert(self.values(row), to);
        if E::SCALED {
            let (slot, layout) = (self.store.slots[row] as usize, self.store.layout);
            let block_size = layout.spec.block_size;
            let at = layout.scales(slot / block_size, self.head, self.of_v) + slot % block_size;
            // SAFETY: the slot is within the cache (`check_slots`), behind whose elements lie the scales; only this
            // task writes those of its head's K or V.
            unsafe { self.scales.at(at).write(scale) };
        }
    }

    /// Writes the K of eight positions from `slot`, of which `values` are `[8][head_dim]`: three shuffles transpose
    /// them. Both slices hold eight heads and are scratch afterwards.
    #[inline(always)]
    fn store_k_group(&self, slot: usize, values: &mut [E], shuffled: &mut [E]) {
        let layout = self.store.layout;
        let block_size = layout.spec.block_size;
        let (block, offset) = (slot / block_size, slot % block_size);
        let first = layout.k_group(block, self.head, offset / LANES);
        // SAFETY: `slot` and the seven after it are within the cache (`check_slots`) and one group of a block, so these
        // are initialized elements of `head`'s K, which only this task writes.
        let group = unsafe { std::slice::from_raw_parts_mut(self.memory.at(first), values.len()) };
        shuffle(values, shuffled);
        shuffle(shuffled, values);
        shuffle(values, group);
    }

    fn store_k(&self, slot: usize, values: &[E]) {
        let layout = self.store.layout;
        let block_size = layout.spec.block_size;
        let (block, offset) = (slot / block_size, slot % block_size);
        let first = layout.k_group(block, self.head, offset / LANES) + offset % LANES;
        for (d, &value) in values.iter().enumerate() {
            // SAFETY: the slot is within the cache (`check_slots`), so this is an element of `head`'s K, which only
            // this task writes.
            unsafe { self.memory.at(first + d * LANES).write(value) };
        }
    }

    fn store_v(&self, slot: usize, values: &[E]) {
        let layout = self.store.layout;
        let block_size = layout.spec.block_size;
        let (block, offset) = (slot / block_size, slot % block_size);
        let first =
            layout.v_group(block, self.head, offset / LANES) + offset % LANES * layout.v_vectors() * LANES;
        // SAFETY: the slot is within the cache (`check_slots`), so this is a row of `head`'s V, which only this task
        // writes; `values` lies elsewhere.
        unsafe {
            self.memory
                .at(first)
                .copy_from_nonoverlapping(values.as_ptr(), values.len())
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::CpuBackend;
    use crate::{Backend, BatchInput, KvSpec};

    /// One sequence whose rows go to `slots`.
    fn step(backend: &CpuBackend, slots: &[u32]) -> CpuBatch {
        let rows = slots.len() as u32;
        let input = BatchInput {
            token_ids: vec![0; slots.len()],
            positions: (0..rows).collect(),
            slot_mapping: slots.to_vec(),
            cu_seqlens_q: vec![0, rows],
            context_lens: vec![rows],
            block_tables: Vec::new(),
            cu_blocks: vec![0, 0],
        };
        backend.batch(&input).unwrap()
    }

    fn stored(dtype: KvDtype, head_dim: usize, slots: &[u32], rows_per_step: usize) -> Vec<u8> {
        let backend = CpuBackend::new(2).unwrap();
        let heads = Heads {
            num_q: 2,
            num_kv: 2,
            head_dim,
            q_start: 0,
            kv_start: 0,
            group_size: 1,
            sliding_window: None,
        };
        let spec = KvSpec {
            num_blocks: 4,
            block_size: 16,
            num_kv_heads: 2,
            head_dim,
            dtype,
        };
        let mut kv = backend.kv_cache(spec).unwrap();
        let width = heads.qkv_width();
        for (step_of, slots) in slots.chunks(rows_per_step).enumerate() {
            let mut qkv = backend.buffer(slots.len(), width).unwrap();
            let first = step_of * rows_per_step * width;
            let values: Vec<f32> = (first..first + slots.len() * width)
                .map(|i| (i * 7919 % 1013) as f32 / 506.0 - 1.0)
                .collect();
            backend.write(&mut qkv, &values).unwrap();
            backend
                .reshape_and_cache(&mut kv, &qkv, &heads, &step(&backend, slots))
                .unwrap();
        }
        kv.memory.as_slice().to_vec()
    }

    /// A row that comes alone is never part of a group.
    #[test]
    fn whole_groups_are_stored_as_their_rows_are() {
        let mut slots = vec![3];
        slots.extend(8..16); // a group
        slots.push(5);
        slots.extend(33..41); // eight in a row that are of two groups
        slots.extend(48..64); // two groups
        slots.extend([16, 17, 18, 19, 20, 21, 23, 22]); // a group in another order
        slots.extend(8..16); // the first group again
        slots.push(50); // a position of another one again
        slots.extend(24..31); // too few
        for dtype in [
            KvDtype::F32,
            KvDtype::F16,
            KvDtype::BF16,
            KvDtype::E4M3,
            KvDtype::INT8,
        ] {
            for head_dim in [1, 20, 64] {
                let at_once = stored(dtype, head_dim, &slots, slots.len());
                let one_by_one = stored(dtype, head_dim, &slots, 1);
                assert!(at_once == one_by_one, "{dtype:?}, heads of {head_dim}");
            }
        }
    }
}

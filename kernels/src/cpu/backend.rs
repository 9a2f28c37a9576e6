//! [`Backend`] on a CPU.

use std::cell::RefCell;
use std::ops::Range;

use super::attention::{self, Attention};
use super::batch::CpuBatch;
use super::buffer::CpuBuffer;
use super::exec::{Exec, check};
use super::kv_cache::{self, CpuKvCache};
use super::linear::{self, Output, PackedWeight, Rows};
use super::memory::Arena;
use super::norm::{self, RmsNorm};
use super::pool::Pool;
use super::rotary::{self, Rotary};
use super::simd::Isa;
use super::{candidates, count, embedding, silu};
use crate::{
    Backend, BatchInput, CandidateRequest, Candidates, Columns, DecodeShape, Heads, KvSpec, Linear, NoGraphs,
    Norm, Result, Rope, Threshold, WeightSource,
};

/// A rank's threads and memory. One thread drives it; the ops use all of its threads.
///
/// The same instruction set gives the same bits for a row whatever the number of threads.
pub struct CpuBackend {
    pool: Pool,
    isa: Isa,
    linear_scratch: RefCell<linear::Scratch>,
    arena: Arena,
}

/// A short f32 vector.
pub struct CpuVector(Box<[f32]>);

impl CpuBackend {
    /// `threads` counts the caller; the others inherit its CPU affinity. Uses the best instructions of the machine.
    ///
    /// # Errors
    /// [`KernelError::Device`](crate::KernelError::Device) if so many threads are not possible.
    pub fn new(threads: usize) -> Result<Self> {
        Self::with_isa(threads, Isa::detect(), linear::Isa::detect())
    }

    /// Runs the code for machines without special instructions.
    ///
    /// # Errors
    /// As [`CpuBackend::new`].
    pub fn portable(threads: usize) -> Result<Self> {
        Self::with_isa(threads, Isa::Portable, linear::Isa::PORTABLE)
    }

    fn with_isa(threads: usize, isa: Isa, linear_isa: linear::Isa) -> Result<Self> {
        Ok(Self {
            pool: Pool::new(threads)?,
            isa,
            linear_scratch: RefCell::new(linear::Scratch::new(linear_isa)),
            arena: Arena::new(),
        })
    }

    /// The instruction set in use: `avx2` or `portable`.
    pub fn isa(&self) -> &'static str {
        self.isa.name()
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    fn exec(&self) -> Exec<'_> {
        Exec {
            pool: &self.pool,
            isa: self.isa,
        }
    }
}

impl Backend for CpuBackend {
    type Buffer = CpuBuffer;
    type Weight = PackedWeight;
    type Vector = CpuVector;
    type KvCache = CpuKvCache;
    type Batch = CpuBatch;
    type GraphCache = NoGraphs;

    fn buffer(&self, rows: usize, width: usize) -> Result<CpuBuffer> {
        CpuBuffer::private(&self.arena, rows, width)
    }

    fn weight(&self, parts: &[WeightSource<'_>]) -> Result<PackedWeight> {
        PackedWeight::pack(parts, &self.pool, &self.arena)
    }

    fn vector(&self, values: &[f32]) -> Result<CpuVector> {
        Ok(CpuVector(values.into()))
    }

    fn kv_cache(&self, spec: KvSpec) -> Result<CpuKvCache> {
        CpuKvCache::new(spec)
    }

    fn batch(&self, input: &BatchInput) -> Result<CpuBatch> {
        CpuBatch::new(input.clone())
    }

    fn graph_cache(&self, _shape: &DecodeShape) -> Result<Option<NoGraphs>> {
        Ok(None)
    }

    fn write(&self, buffer: &mut CpuBuffer, values: &[f32]) -> Result<()> {
        let rows = values.len().checked_div(buffer.width()).unwrap_or(0);
        check("write", rows * buffer.width() == values.len(), || {
            format!("{} values are not whole rows of {}", values.len(), buffer.width())
        })?;
        buffer.check("write", rows, buffer.width())?;
        buffer.values_mut()[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn read(&self, buffer: &CpuBuffer, rows: usize) -> Result<Vec<f32>> {
        buffer.check("read", rows, buffer.width())?;
        Ok(buffer.values()[..rows * buffer.width()].to_vec())
    }

    fn weight_bytes(&self, weight: &PackedWeight) -> usize {
        weight.bytes()
    }

    fn embedding(
        &self,
        out: &mut CpuBuffer,
        table: &PackedWeight,
        vocab: Range<usize>,
        batch: &CpuBatch,
    ) -> Result<()> {
        embedding::embedding(self.exec(), out, table, vocab, batch)
    }

    fn rms_norm(&self, out: &mut CpuBuffer, x: &CpuBuffer, norm: &Norm<'_, Self>, rows: usize) -> Result<()> {
        norm::rms_norm(
            self.exec(),
            out,
            x,
            RmsNorm {
                weight: &norm.weight.0,
                eps: norm.eps,
                rows,
            },
        )
    }

    fn fused_add_rms_norm(
        &self,
        out: &mut CpuBuffer,
        residual: &mut CpuBuffer,
        delta: &CpuBuffer,
        norm: &Norm<'_, Self>,
        rows: usize,
    ) -> Result<()> {
        let norm = RmsNorm {
            weight: &norm.weight.0,
            eps: norm.eps,
            rows,
        };
        norm::fused_add_rms_norm(self.exec(), out, residual, delta, norm)
    }

    fn linear(
        &self,
        out: Columns<'_, Self>,
        x: &CpuBuffer,
        weight: &Linear<'_, Self>,
        rows: usize,
    ) -> Result<()> {
        const OP: &str = "linear";
        let Linear { weight, bias } = *weight;
        x.check(OP, rows, weight.cols())?;
        out.buffer
            .check(OP, rows, out.start.saturating_add(weight.rows()))?;
        check(OP, bias.is_none_or(|b| b.0.len() == weight.rows()), || {
            format!("a bias of another length than {}", weight.rows())
        })?;
        let x = Rows {
            data: x.values(),
            rows,
            stride: x.width(),
        };
        let out = Output {
            stride: out.buffer.width(),
            data: out.buffer.values_mut(),
            column: out.start,
            bias: bias.map(|b| &*b.0),
        };
        weight.matmul(&self.pool, &mut self.linear_scratch.borrow_mut(), x, out)
    }

    fn rotary_embedding(
        &self,
        qkv: &mut CpuBuffer,
        rope: &Rope<'_, Self>,
        heads: &Heads,
        batch: &CpuBatch,
    ) -> Result<()> {
        let rotary = Rotary {
            inverse_frequencies: &rope.inverse_frequencies.0,
            attention_factor: rope.attention_factor,
            layout: rope.layout,
        };
        rotary::rotary_embedding(self.exec(), qkv, rotary, heads, batch)
    }

    fn reshape_and_cache(
        &self,
        kv: &mut CpuKvCache,
        qkv: &CpuBuffer,
        heads: &Heads,
        batch: &CpuBatch,
    ) -> Result<()> {
        kv_cache::reshape_and_cache(self.exec(), kv, qkv, heads, batch)
    }

    fn paged_attention(
        &self,
        out: Columns<'_, Self>,
        qkv: &CpuBuffer,
        kv: &CpuKvCache,
        heads: &Heads,
        batch: &CpuBatch,
    ) -> Result<()> {
        let attention = Attention {
            qkv,
            kv,
            heads,
            batch,
        };
        attention::paged_attention(self.exec(), out.buffer, out.start, attention)
    }

    fn silu_and_mul(&self, out: Columns<'_, Self>, gate_up: &CpuBuffer, rows: usize) -> Result<()> {
        silu::silu_and_mul(self.exec(), out.buffer, out.start, gate_up, rows)
    }

    fn select_rows(&self, out: &mut CpuBuffer, x: &CpuBuffer, rows: &[u32]) -> Result<()> {
        embedding::select_rows(out, x, rows)
    }

    fn candidates(&self, logits: &CpuBuffer, requests: &[CandidateRequest<'_>]) -> Result<Vec<Candidates>> {
        candidates::candidates(self.exec(), logits, requests)
    }

    fn count_at_least(&self, x: &CpuBuffer, columns: usize, thresholds: &[Threshold]) -> Result<Vec<u32>> {
        count::count_at_least(self.exec(), x, columns, thresholds)
    }
}

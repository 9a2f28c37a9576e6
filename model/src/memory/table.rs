//! The memory plan as text.

use std::{fmt, ops::Range};

use super::{MemoryHolder, MemoryPlan, Placement, RankMemory};

/// Bytes, exact and in the unit a person reads: `98,362,432 B (93.8 MiB)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HumanBytes(pub u64);

impl fmt::Display for HumanBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let digits = self.0.to_string();
        let mut text = String::new();
        for (i, digit) in digits.chars().enumerate() {
            if i > 0 && (digits.len() - i).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        text.push_str(" B");
        let (mut value, mut unit) = (self.0 as f64 / 1024.0, 0);
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            (value, unit) = (value / 1024.0, unit + 1);
        }
        if self.0 >= 1024 {
            text.push_str(&format!(" ({value:.1} {})", UNITS[unit]));
        }
        f.pad(&text)
    }
}

impl fmt::Display for MemoryHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rank(rank) => write!(f, "rank {rank}"),
            Self::Host { largest_rank } => {
                write!(
                    f,
                    "the host (all ranks, of which rank {largest_rank} most, and the segment)"
                )
            }
            Self::SharedSegment => f.write_str("the shared segment in /dev/shm"),
        }
    }
}

/// A [`MemoryPlan`] with a number of KV blocks, to be displayed.
#[derive(Clone, Copy, Debug)]
pub struct MemoryTable<'a> {
    pub(super) plan: &'a MemoryPlan,
    pub(super) num_blocks: u64,
}

impl fmt::Display for MemoryTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = self.plan;
        writeln!(
            f,
            "{:<5} {:>10} {:>10} {:>14} {:>14} {:>16}",
            "rank", "q heads", "kv heads", "intermediate", "hidden", "vocabulary"
        )?;
        let span = |range: &Range<usize>| format!("{}..{}", range.start, range.end);
        for (rank, held) in plan.shards.ranks.iter().enumerate() {
            let (q, kv) = (span(&held.q_heads), span(&held.kv_heads));
            let (intermediate, hidden, vocab) =
                (span(&held.intermediate), span(&held.hidden), span(&held.vocab));
            writeln!(
                f,
                "{rank:<5} {q:>10} {kv:>10} {intermediate:>14} {hidden:>14} {vocab:>16}"
            )?;
        }
        writeln!(f)?;
        let mut first = 0;
        for alike in plan.ranks.chunk_by(|a, b| a == b) {
            self.ranks(f, first..first + alike.len(), &alike[0])?;
            first += alike.len();
        }
        writeln!(f, "host")?;
        line(f, "shared segment", plan.segment)?;
        if plan.placement == Placement::Host {
            line(f, "total", plan.host_total(self.num_blocks))?;
        }
        let tokens = self.num_blocks.saturating_mul(plan.block_size as u64);
        writeln!(
            f,
            "\n{} KV blocks of {} tokens: {tokens} tokens",
            self.num_blocks, plan.block_size
        )?;
        match plan.ranks.iter().map(|rank| rank.kv_bytes_per_block).max() {
            Some(largest) => writeln!(f, "one block takes at most {} on a rank", HumanBytes(largest)),
            None => Ok(()),
        }
    }
}

impl MemoryTable<'_> {
    /// Bytes of each of some ranks that are alike.
    fn ranks(&self, f: &mut fmt::Formatter<'_>, ranks: Range<usize>, memory: &RankMemory) -> fmt::Result {
        match ranks.len() {
            1 => writeln!(f, "rank {}", ranks.start)?,
            _ => writeln!(f, "ranks {} to {}, each", ranks.start, ranks.end - 1)?,
        }
        line(f, "weights", memory.weights)?;
        line(f, "KV cache", memory.kv_bytes(self.num_blocks))?;
        line(f, "workspace", memory.workspace)?;
        match self.plan.placement {
            Placement::Host => line(f, "process (estimate)", memory.overhead)?,
            Placement::Gpus(_) => {
                line(f, "kernels (estimate)", memory.overhead)?;
                line(f, "CUDA graphs (estimate)", memory.graphs)?;
                line(f, "NCCL (estimate)", memory.communicator)?;
            }
        }
        line(f, "total", memory.total(self.num_blocks))
    }
}

fn line(f: &mut fmt::Formatter<'_>, what: &str, bytes: u64) -> fmt::Result {
    writeln!(f, "  {what:<22} {:>38}", HumanBytes(bytes))
}

//! The rows of one step, flattened the way attention wants them.

use crate::Result;
use crate::error::check;

/// Host-side description of a step. Token `t` of the step is row `t` of every activation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchInput {
    /// Token ids, one per row.
    pub token_ids: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// `block * block_size + offset` where each row's K and V go.
    pub slot_mapping: Vec<u32>,
    /// Row at which each sequence starts, and the total: `sequences + 1` entries.
    pub cu_seqlens_q: Vec<u32>,
    /// Tokens of each sequence including this step's.
    pub context_lens: Vec<u32>,
    /// All block tables one after another, and where each starts: `sequences + 1` entries.
    pub block_tables: Vec<u32>,
    pub cu_blocks: Vec<u32>,
}

impl BatchInput {
    pub fn num_rows(&self) -> usize {
        self.token_ids.len()
    }
    pub fn num_sequences(&self) -> usize {
        self.context_lens.len()
    }
}

/// A [`BatchInput`] whose parts fit together.
#[derive(Debug)]
pub(crate) struct CheckedBatch {
    input: BatchInput,
    /// Largest entry of the block tables and of the slot mapping, plus one.
    num_blocks: usize,
    num_slots: usize,
}

impl CheckedBatch {
    /// # Errors
    /// [`KernelError::Shape`](crate::KernelError::Shape) if lengths, offsets or positions contradict each other.
    pub(crate) fn new(input: BatchInput) -> Result<Self> {
        const OP: &str = "batch";
        let rows = input.num_rows();
        let sequences = input.num_sequences();
        check(
            OP,
            input.positions.len() == rows && input.slot_mapping.len() == rows,
            || {
                format!(
                    "{rows} tokens, {} positions, {} slots",
                    input.positions.len(),
                    input.slot_mapping.len()
                )
            },
        )?;
        check_offsets("cu_seqlens_q", &input.cu_seqlens_q, sequences, rows)?;
        check_offsets("cu_blocks", &input.cu_blocks, sequences, input.block_tables.len())?;
        for sequence in 0..sequences {
            let range = input.cu_seqlens_q[sequence] as usize..input.cu_seqlens_q[sequence + 1] as usize;
            let len = input.context_lens[sequence];
            check(OP, input.positions[range].iter().all(|&p| p < len), || {
                format!("a position of sequence {sequence} is not below its context length {len}")
            })?;
        }
        let bound = |entries: &[u32]| entries.iter().max().map_or(0, |&m| m as usize + 1);
        Ok(Self {
            num_blocks: bound(&input.block_tables),
            num_slots: bound(&input.slot_mapping),
            input,
        })
    }

    pub(crate) fn input(&self) -> &BatchInput {
        &self.input
    }

    /// An error unless all slots exist.
    pub(crate) fn check_slots(&self, op: &'static str, num_slots: usize) -> Result<()> {
        check(op, self.num_slots <= num_slots, || {
            format!("slot {} of {num_slots}", self.num_slots - 1)
        })
    }

    /// An error unless all blocks exist and every sequence has enough of them.
    pub(crate) fn check_blocks(&self, op: &'static str, num_blocks: usize, block_size: usize) -> Result<()> {
        check(op, self.num_blocks <= num_blocks, || {
            format!("block {} of {num_blocks}", self.num_blocks - 1)
        })?;
        for (sequence, &len) in self.input.context_lens.iter().enumerate() {
            let blocks = self.block_table(sequence).len();
            check(op, blocks.saturating_mul(block_size) >= len as usize, || {
                format!("{len} tokens in {blocks} blocks of {block_size}")
            })?;
        }
        Ok(())
    }

    pub(crate) fn block_table(&self, sequence: usize) -> &[u32] {
        let cu_blocks = &self.input.cu_blocks;
        &self.input.block_tables[cu_blocks[sequence] as usize..cu_blocks[sequence + 1] as usize]
    }
}

/// An error unless `offsets` are `parts + 1` rising numbers from 0 to `total`.
fn check_offsets(what: &'static str, offsets: &[u32], parts: usize, total: usize) -> Result<()> {
    let ends = offsets.first() == Some(&0) && offsets.last().map(|&n| n as usize) == Some(total);
    // A step without sequences needs no offsets.
    let empty = offsets.is_empty() && parts == 0 && total == 0;
    check(
        "batch",
        empty || (ends && offsets.len() == parts + 1 && offsets.is_sorted()),
        || format!("{what} {offsets:?} does not cut {total} entries into {parts} parts"),
    )
}

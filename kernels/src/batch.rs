//! The rows of one step, flattened the way attention wants them.

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

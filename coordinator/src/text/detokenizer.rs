//! Token ids to text, one token at a time.

use std::sync::Arc;

use super::tokenizer::TokenTable;

/// Turns a stream of token ids into text. Never emits a part of a character: bytes that may be the beginning of one wait
/// for the rest. All text ever emitted equals the lossy UTF-8 decoding of the tokens' concatenated bytes.
#[derive(Debug)]
pub struct Detokenizer {
    table: Arc<TokenTable>,
    skip_special_tokens: bool,
    /// Special tokens that are not skipped. Sorted.
    shown: Arc<[u32]>,
    /// The last token's unfinished character (at most three bytes between calls), and room for the next token.
    pending: Vec<u8>,
}

impl Detokenizer {
    pub fn new(table: Arc<TokenTable>, skip_special_tokens: bool) -> Self {
        Self {
            table,
            skip_special_tokens,
            shown: Arc::default(),
            pending: Vec::new(),
        }
    }

    /// Shows these special tokens (sorted) even if it skips the others.
    pub fn showing(self, shown: Arc<[u32]>) -> Self {
        Self { shown, ..self }
    }

    /// Appends to `out` the text that `token` completes. Costs the token's length.
    pub fn push(&mut self, token: u32, out: &mut String) {
        let is_skipped = self.skip_special_tokens && self.table.is_special(token);
        if is_skipped && self.shown.binary_search(&token).is_err() {
            return;
        }
        self.pending.extend_from_slice(self.table.bytes(token));
        let mut unfinished = 0;
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            out.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if chunks.peek().is_none() && is_unfinished(invalid) {
                unfinished = invalid.len();
            } else if !invalid.is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - unfinished);
    }

    /// Appends what waits for a character's end that will not come.
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

/// Whether `bytes` could become a character if more bytes came.
fn is_unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

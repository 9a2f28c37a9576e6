//! Text to token ids, from a `tokenizer.json` or from GGUF metadata.

mod gguf;
mod hf;
mod pre;
mod table;

use std::sync::Arc;

pub use gguf::GgufVocab;
pub use hf::HfFiles;
pub(crate) use hf::read_file;
#[cfg(test)]
pub(super) use table::{EntryKind, TokenEntry};
pub use table::{MAX_VOCAB_SIZE, TokenEncoding, TokenTable};

use super::TextError;

/// A model's tokenizer. Encoding is CPU work: keep it off the async threads.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    table: Arc<TokenTable>,
    special: SpecialTokens,
    /// Put before a text when special tokens are asked for; a tokenizer.json does so itself.
    prefix: Option<u32>,
    suffix: Option<u32>,
    /// Encoding put a space before the text, so decoding takes one away.
    strips_first_space: bool,
}

/// Tokens with a role, and their text as chat templates use it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// Ids that end a generation, `eos` among them; sorted, without duplicates.
    pub end_of_generation: Vec<u32>,
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
    pub unk_token: Option<String>,
    pub pad_token: Option<String>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("tokens", &self.table.len())
            .field("special", &self.special)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Errors name the metadata field that is missing, unsupported or inconsistent.
    pub fn from_gguf(vocab: &GgufVocab) -> Result<Self, TextError> {
        vocab.build()
    }

    /// Token ids of `text`. Names of special tokens within the text become those tokens, as in every peer.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|error| TextError::invalid("prompt", "text", error.to_string()))?;
        let prefix = self.prefix.filter(|_| add_special_tokens);
        let suffix = self.suffix.filter(|_| add_special_tokens);
        let ids = encoding.get_ids().iter().copied();
        Ok(prefix.into_iter().chain(ids).chain(suffix).collect())
    }

    /// The whole text of `tokens`, invalid UTF-8 replaced.
    pub fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> String {
        let mut detokenizer = super::Detokenizer::new(self.table.clone(), skip_special_tokens);
        let mut text = String::new();
        for &token in tokens {
            detokenizer.push(token, &mut text);
        }
        detokenizer.finish(&mut text);
        if self.strips_first_space && text.starts_with(' ') {
            text.remove(0);
        }
        text
    }

    /// The token as the vocabulary spells it, `Ġworld` and not ` world`; none for an id without a token.
    pub fn spelling(&self, token: u32) -> Option<String> {
        self.inner.id_to_token(token)
    }

    /// The token that is spelled `text`, if there is one.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    pub fn table(&self) -> &Arc<TokenTable> {
        &self.table
    }
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }
}

//! A tokenizer from the metadata of a GGUF file.

use std::collections::HashMap;

use phalanx_model::gguf::Gguf;
use tokenizers::{
    AddedToken, NormalizerWrapper,
    models::bpe::{BPE, Merges, Vocab},
    normalizers::{prepend::Prepend, replace::Replace, utils::Sequence},
};

use super::{
    SpecialTokens, Tokenizer,
    pre::PreTokenizer,
    table::{EntryKind, MAX_VOCAB_BYTES, MAX_VOCAB_SIZE, TokenEncoding, TokenEntry, TokenTable, byte_piece},
};
use crate::text::TextError;

/// Most merges of a byte-pair vocabulary.
const MAX_MERGES: usize = 1 << 21;
/// SentencePiece's own limit is 16 characters unless a trainer asked for more. Keeps the search for merges linear.
const MAX_PIECE_BYTES: usize = 512;

/// Token types of the GGUF specification (`llama_token_type`).
mod token_type {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
    pub(super) const BYTE: i32 = 6;
}

/// Control tokens that end a turn or a text whatever `eos_token_id` says, as llama.cpp recognizes them.
const END_OF_GENERATION: [&str; 11] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
    "<end_of_utterance>",
];

/// The `tokenizer.*` part of a GGUF file's metadata. Nothing in it has been checked but its types.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub model: String,
    pub pre: Option<String>,
    pub tokens: Vec<String>,
    pub scores: Vec<f32>,
    pub token_types: Vec<i32>,
    pub merges: Vec<String>,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<u32>,
    pub unknown_token_id: Option<u32>,
    pub padding_token_id: Option<u32>,
    /// `eot_token_id`, `eom_token_id`: end a turn.
    pub end_of_turn_token_ids: Vec<u32>,
    pub add_bos_token: Option<bool>,
    pub add_eos_token: Option<bool>,
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// `tokenizer.chat_template.tool_use`: the template of conversations with tools, if they have one of their own.
    pub tool_template: Option<String>,
}

impl GgufVocab {
    /// Reads the fields out of a file's metadata. Errors: a field of the wrong type, or `tokenizer.ggml.model` or
    /// `tokens` missing. [`Tokenizer::from_gguf`] checks what they say.
    pub fn from_metadata<B: AsRef<[u8]>>(file: &Gguf<B>) -> Result<Self, TextError> {
        let missing = |field| TextError::Missing { field };
        let text = |key| Ok::<_, TextError>(file.str(key)?.map(str::to_owned));
        let id = |key| match file.u64(key)? {
            None => Ok(None),
            Some(id) => u32::try_from(id)
                .map(Some)
                .map_err(|_| TextError::invalid("a token id", id, format!("of {key}, which is no token"))),
        };
        let strings = |key| {
            let strings = file.strings(key)?.into_iter().flatten();
            Ok::<_, TextError>(strings.map(str::to_owned).collect::<Vec<_>>())
        };
        // A type no version has named is as good as any other number outside the known ones.
        let token_type = |value: i64| i32::try_from(value).unwrap_or(i32::MAX);
        let types = file.integers("tokenizer.ggml.token_type")?.into_iter().flatten();
        let turns = [
            id("tokenizer.ggml.eot_token_id")?,
            id("tokenizer.ggml.eom_token_id")?,
        ];
        Ok(Self {
            model: text("tokenizer.ggml.model")?.ok_or_else(|| missing("tokenizer.ggml.model"))?,
            pre: text("tokenizer.ggml.pre")?,
            tokens: strings("tokenizer.ggml.tokens")?,
            scores: file
                .floats("tokenizer.ggml.scores")?
                .into_iter()
                .flatten()
                .collect(),
            token_types: types.map(token_type).collect(),
            merges: strings("tokenizer.ggml.merges")?,
            bos_token_id: id("tokenizer.ggml.bos_token_id")?,
            eos_token_id: id("tokenizer.ggml.eos_token_id")?,
            unknown_token_id: id("tokenizer.ggml.unknown_token_id")?,
            padding_token_id: id("tokenizer.ggml.padding_token_id")?,
            end_of_turn_token_ids: turns.into_iter().flatten().collect(),
            add_bos_token: file.bool("tokenizer.ggml.add_bos_token")?,
            add_eos_token: file.bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: file.bool("tokenizer.ggml.add_space_prefix")?,
            chat_template: text("tokenizer.chat_template")?,
            tool_template: text("tokenizer.chat_template.tool_use")?,
        })
    }

    pub(super) fn build(&self) -> Result<Tokenizer, TextError> {
        self.check()?;
        let (encoding, inner, add_bos) = match self.model.as_str() {
            "gpt2" => {
                let (inner, add_bos) = self.byte_level()?;
                (TokenEncoding::ByteLevel, inner, add_bos)
            }
            "llama" => (TokenEncoding::BytePieces, self.byte_pieces()?, true),
            other => {
                return Err(TextError::Unsupported {
                    field: "tokenizer.ggml.model",
                    value: other.to_owned(),
                    supported: "gpt2, llama".to_owned(),
                });
            }
        };
        let add_bos = self.add_bos_token.unwrap_or(add_bos);
        let add_eos = self.add_eos_token.unwrap_or(false);
        Ok(Tokenizer {
            table: self.table(encoding)?.into(),
            inner: self.with_added_tokens(inner),
            special: self.special_tokens(),
            prefix: self.bos_token_id.filter(|_| add_bos),
            suffix: self.eos_token_id.filter(|_| add_eos),
            strips_first_space: encoding == TokenEncoding::BytePieces
                && self.add_space_prefix.unwrap_or(true),
        })
    }

    fn check(&self) -> Result<(), TextError> {
        let count = self.tokens.len();
        if count == 0 {
            return Err(TextError::Missing {
                field: "tokenizer.ggml.tokens",
            });
        }
        TextError::check_limit("length of tokenizer.ggml.tokens", count, MAX_VOCAB_SIZE)?;
        TextError::check_limit("length of tokenizer.ggml.merges", self.merges.len(), MAX_MERGES)?;
        let bytes = self.tokens.iter().map(String::len).sum();
        TextError::check_limit("bytes of tokenizer.ggml.tokens", bytes, MAX_VOCAB_BYTES)?;
        for (field, length) in [
            ("tokenizer.ggml.token_type", self.token_types.len()),
            ("tokenizer.ggml.scores", self.scores.len()),
        ] {
            if length != 0 && length != count {
                return Err(TextError::invalid(
                    field,
                    format!("{length} entries"),
                    format!("expected {count}, one per token"),
                ));
            }
        }
        let named = [
            ("tokenizer.ggml.bos_token_id", self.bos_token_id),
            ("tokenizer.ggml.eos_token_id", self.eos_token_id),
            ("tokenizer.ggml.unknown_token_id", self.unknown_token_id),
            ("tokenizer.ggml.padding_token_id", self.padding_token_id),
        ];
        let turns = self
            .end_of_turn_token_ids
            .iter()
            .map(|&id| ("tokenizer.ggml.eot_token_id", Some(id)));
        for (field, id) in named.into_iter().chain(turns) {
            if let Some(id) = id.filter(|&id| id as usize >= count) {
                return Err(TextError::OverLimit {
                    field,
                    value: id.into(),
                    limit: count as u64 - 1,
                });
            }
        }
        Ok(())
    }

    /// GPT-2 style BPE, with whether a prompt starts with BOS by default.
    fn byte_level(&self) -> Result<(tokenizers::Tokenizer, bool), TextError> {
        let name = self.pre.as_deref().unwrap_or_else(|| {
            tracing::warn!("the model file names no pre-tokenizer; words may be cut unlike in training");
            "default"
        });
        let pre = PreTokenizer::by_name(name)?;
        let merges = self
            .merges
            .iter()
            .map(|merge| split_merge(merge))
            .collect::<Result<Merges, _>>()?;
        let bpe = BPE::builder()
            .vocab_and_merges(self.vocab(), merges)
            .ignore_merges(pre.ignore_merges)
            .build()
            .map_err(|error| TextError::invalid("tokenizer.ggml.merges", "an entry", error.to_string()))?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        inner.with_pre_tokenizer(Some(pre.build()?));
        inner.with_normalizer(pre.normalizer());
        Ok((inner, pre.add_bos))
    }

    /// SentencePiece BPE, as Hugging Face converts it: the scores order the merges.
    fn byte_pieces(&self) -> Result<tokenizers::Tokenizer, TextError> {
        if self.scores.is_empty() {
            return Err(TextError::Missing {
                field: "tokenizer.ggml.scores",
            });
        }
        let unknown = self.unknown_token_id.and_then(|id| self.token(id));
        let vocab = self.vocab();
        let merges = self.merges_by_score(&vocab)?;
        let mut builder = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .byte_fallback(true)
            .fuse_unk(true);
        if let Some(unknown) = unknown {
            builder = builder.unk_token(unknown.to_owned());
        }
        let bpe = builder
            .build()
            .map_err(|error| TextError::invalid("tokenizer.ggml.tokens", "an entry", error.to_string()))?;
        let spaces = Replace::new(" ", "▁").map_err(|error| {
            TextError::invalid("normalizer", "the replacement of spaces", error.to_string())
        })?;
        let mut normalizers: Vec<NormalizerWrapper> = vec![spaces.into()];
        if self.add_space_prefix.unwrap_or(true) {
            normalizers.insert(0, Prepend::new("▁".to_owned()).into());
        }
        let mut inner = tokenizers::Tokenizer::new(bpe);
        inner.with_normalizer(Some(Sequence::new(normalizers)));
        Ok(inner)
    }

    /// Every cut of a piece into two pieces is a merge; the better the whole's score, the earlier.
    fn merges_by_score(&self, vocab: &Vocab) -> Result<Merges, TextError> {
        let mut found: Vec<(f32, u32, u32, usize)> = Vec::new();
        for (at, piece) in self.tokens.iter().enumerate() {
            if self.kind(at) != EntryKind::Ordinary || byte_piece(piece).is_some() {
                continue;
            }
            TextError::check_limit("bytes of a SentencePiece token", piece.len(), MAX_PIECE_BYTES)?;
            for (cut, _) in piece.char_indices().skip(1) {
                let (left, right) = piece.split_at(cut);
                if let (Some(&left), Some(&right)) = (vocab.get(left), vocab.get(right)) {
                    found.push((self.scores[at], left, right, at));
                }
            }
            TextError::check_limit(
                "merges of the SentencePiece vocabulary",
                found.len(),
                4 * MAX_MERGES,
            )?;
        }
        found.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let text = |id: u32| self.tokens[id as usize].clone();
        Ok(found
            .into_iter()
            .map(|(_, left, right, _)| (text(left), text(right)))
            .collect())
    }

    /// Of equal strings, the first keeps its id.
    fn vocab(&self) -> Vocab {
        let mut vocab = Vocab::default();
        for (id, token) in self.tokens.iter().enumerate() {
            vocab.entry(token.clone()).or_insert(id as u32);
        }
        vocab
    }

    fn kind(&self, at: usize) -> EntryKind {
        match self.token_types.get(at).copied().unwrap_or(token_type::NORMAL) {
            token_type::CONTROL | token_type::UNKNOWN => EntryKind::Special,
            token_type::USER_DEFINED => EntryKind::Added,
            token_type::NORMAL | token_type::BYTE => EntryKind::Ordinary,
            // Unused ids of padded vocabularies, and whatever later versions add.
            _ => EntryKind::Ordinary,
        }
    }

    fn with_added_tokens(&self, mut inner: tokenizers::Tokenizer) -> tokenizers::Tokenizer {
        let added = self.tokens.iter().enumerate().filter_map(|(at, token)| {
            let special = match self.kind(at) {
                EntryKind::Ordinary => return None,
                EntryKind::Added => false,
                EntryKind::Special => true,
            };
            Some(AddedToken::from(token.clone(), special).normalized(false))
        });
        inner.add_tokens(&added.collect::<Vec<_>>());
        inner
    }

    fn table(&self, encoding: TokenEncoding) -> Result<TokenTable, TextError> {
        let entries = self.tokens.iter().enumerate().map(|(at, text)| {
            Some(TokenEntry {
                text,
                kind: self.kind(at),
            })
        });
        TokenTable::build(encoding, entries)
    }

    fn special_tokens(&self) -> SpecialTokens {
        let ids: HashMap<&str, u32> = self
            .tokens
            .iter()
            .enumerate()
            .filter(|&(at, _)| self.kind(at) != EntryKind::Ordinary)
            .map(|(at, token)| (token.as_str(), at as u32))
            .collect();
        let by_name = END_OF_GENERATION.iter().filter_map(|name| ids.get(name).copied());
        let mut end_of_generation: Vec<u32> = self
            .eos_token_id
            .into_iter()
            .chain(self.end_of_turn_token_ids.iter().copied())
            .chain(by_name)
            .collect();
        end_of_generation.sort_unstable();
        end_of_generation.dedup();
        let text = |id: Option<u32>| id.and_then(|id| self.token(id)).map(str::to_owned);
        SpecialTokens {
            bos: self.bos_token_id,
            eos: self.eos_token_id,
            end_of_generation,
            bos_token: text(self.bos_token_id),
            eos_token: text(self.eos_token_id),
            unk_token: text(self.unknown_token_id),
            pad_token: text(self.padding_token_id),
        }
    }

    fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }
}

/// The two halves of `left right`.
fn split_merge(merge: &str) -> Result<(String, String), TextError> {
    match merge.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
            Ok((left.to_owned(), right.to_owned()))
        }
        _ => Err(TextError::invalid(
            "tokenizer.ggml.merges",
            format!("{merge:?}"),
            "expected two tokens separated by a space",
        )),
    }
}

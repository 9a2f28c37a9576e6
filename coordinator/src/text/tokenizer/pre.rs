//! How text is cut into words before byte-pair merging, by GGUF's `tokenizer.ggml.pre`.
//!
//! The expressions are those of the models' own tokenizer.json files; llama.cpp (`llama-vocab.cpp`) keeps the list of
//! names.

use tokenizers::{
    NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
    normalizers::unicode::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use crate::text::TextError;

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SINGLE_DIGITS: &str = r"\p{N}";
const PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|]+";
const NUMBERS: &str = r"\p{N}+";
const THREE_DIGITS: &str = r"[0-9][0-9][0-9]";

/// What `tokenizer.ggml.pre` decides.
pub(super) struct PreTokenizer {
    /// Expressions applied one after another; every match becomes a word of its own.
    splits: &'static [&'static str],
    /// A word that is a token is that token, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Unless `tokenizer.ggml.add_bos_token` says otherwise.
    pub(super) add_bos: bool,
    nfc: bool,
}

const PLAIN: PreTokenizer = PreTokenizer {
    splits: &[GPT2],
    ignore_merges: false,
    add_bos: false,
    nfc: false,
};

const NAMES: &[(&[&str], PreTokenizer)] = &[
    (
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
        ],
        PreTokenizer {
            splits: &[SINGLE_DIGITS, GPT2],
            ..PLAIN
        },
    ),
    (
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        PreTokenizer {
            splits: &[LLAMA3],
            ignore_merges: true,
            add_bos: true,
            ..PLAIN
        },
    ),
    (
        &["qwen2", "deepseek-r1-qwen", "stablelm2"],
        PreTokenizer {
            splits: &[QWEN2],
            nfc: true,
            ..PLAIN
        },
    ),
    (
        &["tekken"],
        PreTokenizer {
            splits: &[TEKKEN],
            ignore_merges: true,
            add_bos: true,
            ..PLAIN
        },
    ),
    (&["gpt-2", "phi-2", "mpt", "olmo", "jais"], PLAIN),
    (
        &["default"],
        PreTokenizer {
            splits: &[PUNCTUATION, GPT2, NUMBERS, THREE_DIGITS],
            ..PLAIN
        },
    ),
];

impl PreTokenizer {
    /// An unknown name is an error: a wrong guess would give a model other tokens than it was trained with, silently.
    pub(super) fn by_name(name: &str) -> Result<&'static Self, TextError> {
        let known = NAMES.iter().find(|(names, _)| names.contains(&name));
        known.map(|(_, pre)| pre).ok_or_else(|| TextError::Unsupported {
            field: "tokenizer.ggml.pre",
            value: name.to_owned(),
            supported: NAMES
                .iter()
                .flat_map(|(names, _)| names.iter().copied())
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    pub(super) fn normalizer(&self) -> Option<NormalizerWrapper> {
        self.nfc.then(|| NFC.into())
    }

    pub(super) fn build(&self) -> Result<PreTokenizerWrapper, TextError> {
        let split = |pattern: &&str| {
            let pattern = SplitPattern::Regex((*pattern).to_owned());
            Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map(PreTokenizerWrapper::from)
                .map_err(|error| TextError::invalid("pre-tokenizer", "an expression", error.to_string()))
        };
        let mut steps: Vec<PreTokenizerWrapper> = self.splits.iter().map(split).collect::<Result<_, _>>()?;
        // Spells the words in bytes; they are cut already.
        steps.push(ByteLevel::new(false, true, false).into());
        Ok(Sequence::new(steps).into())
    }
}

//! How text is cut into words before byte-pair merging, by GGUF's `tokenizer.ggml.pre`.
//!
//! The expressions are those of the models' own tokenizer.json files; llama.cpp (`llama-vocab.cpp`) keeps the list of
//! names, of which only those are here that models of an architecture we serve have. Where the two cut differently, the
//! model's own file counts.

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
const LINE_BREAKS: &str = r"[\r\n]";
const LETTERS: &str = r"\s?\p{L}+";
const ANY_PUNCTUATION: &str = r"\s?\p{P}+";
const EAST_ASIAN: &str = r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}]+";
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
        &["smollm", "starcoder", "refact", "minerva-7b"],
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
        &["qwen2", "deepseek-r1-qwen"],
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
    (
        &["deepseek-coder"],
        PreTokenizer {
            splits: &[LINE_BREAKS, LETTERS, ANY_PUNCTUATION, EAST_ASIAN, SINGLE_DIGITS],
            ..PLAIN
        },
    ),
    (&["gpt-2"], PLAIN),
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

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::*;

    const TEXT: &str = "I'll say WE'VE 12345 3.14½  café ǅx你好!\n\n  if(x):\r\n\t//httpServer  ٣٤ ";

    fn words(name: &str) -> Vec<&'static str> {
        let pre = PreTokenizer::by_name(name)
            .expect("known")
            .build()
            .expect("valid");
        let mut text = PreTokenizedString::from(TEXT);
        pre.pre_tokenize(&mut text).expect("cut");
        let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits
            .into_iter()
            .map(|(_, (start, end), _)| &TEXT[start..end])
            .collect()
    }

    /// What Hugging Face's Python package (tokenizers 0.22.1, whose expressions run on another engine) makes of it with
    /// the `pre_tokenizer` of a model's tokenizer.json: gpt2, SmolLM2, Meta-Llama-3, Qwen2, Mistral-Nemo, DeepSeek-Coder.
    #[test]
    fn words_are_those_of_the_models_own_tokenizers() {
        #[rustfmt::skip]
        let expected: [(&str, &[&str]); 6] = [
            ("gpt-2", &[
                "I", "'ll", " say", " WE", "'", "VE", " 12345", " 3", ".", "14½", " ", " café", " ǅx你好", "!", "\n\n ",
                " if", "(", "x", "):", "\r\n", "\t", "//", "httpServer", " ", " ٣٤", " ",
            ]),
            ("smollm", &[
                "I", "'ll", " say", " WE", "'", "VE", " ", "1", "2", "3", "4", "5", " ", "3", ".", "1", "4", "½", " ",
                " café", " ǅx你好", "!", "\n\n ", " if", "(", "x", "):", "\r\n", "\t", "//", "httpServer", "  ", "٣",
                "٤", " ",
            ]),
            ("llama-bpe", &[
                "I", "'ll", " say", " WE", "'VE", " ", "123", "45", " ", "3", ".", "14½", " ", " café", " ǅx你好",
                "!\n\n", " ", " if", "(x", "):\r\n", "\t", "//", "httpServer", " ", " ", "٣٤", " ",
            ]),
            ("qwen2", &[
                "I", "'ll", " say", " WE", "'VE", " ", "1", "2", "3", "4", "5", " ", "3", ".", "1", "4", "½", " ",
                " café", " ǅx你好", "!\n\n", " ", " if", "(x", "):\r\n", "\t", "//", "httpServer", " ", " ", "٣", "٤",
                " ",
            ]),
            ("tekken", &[
                "I", "'ll", " say", " WE", "'VE", " ", "1", "2", "3", "4", "5", " ", "3", ".", "1", "4", "½", " ",
                " café", " ǅx你好", "!\n\n", " ", " if", "(x", "):\r\n", "\t", "//", "http", "Server", " ", " ", "٣",
                "٤", " ",
            ]),
            ("deepseek-coder", &[
                "I", "'", "ll", " say", " WE", "'", "VE", " ", "1", "2", "3", "4", "5", " ", "3", ".", "1", "4", "½",
                " ", " café", " ǅx", "你好", "!", "\n", "\n", " ", " if", "(", "x", "):", "\r", "\n", "\t//",
                "httpServer", "  ", "٣", "٤", " ",
            ]),
        ];
        for (name, words_of_it) in expected {
            assert_eq!(words(name), words_of_it, "{name}");
        }
    }

    #[test]
    fn every_expression_compiles_and_every_name_is_there_once() {
        let names: Vec<&str> = NAMES
            .iter()
            .flat_map(|(names, _)| names.iter().copied())
            .collect();
        for name in &names {
            assert_eq!(words(name).concat(), TEXT, "{name}");
            assert_eq!(names.iter().filter(|other| *other == name).count(), 1, "{name}");
        }
        assert!(PreTokenizer::by_name("deepseek-llm").is_err());
    }
}

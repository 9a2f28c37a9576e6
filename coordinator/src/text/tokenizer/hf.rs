//! A tokenizer from the files of a Hugging Face model directory.

use std::{collections::HashMap, fs, io::Read, path::Path};

use serde::Deserialize;
use serde_json::Value;

use super::{
    SpecialTokens, Tokenizer,
    table::{EntryKind, MAX_VOCAB_SIZE, TokenEncoding, TokenEntry, TokenTable},
};
use crate::text::TextError;

/// Most bytes of any one of the files; the largest published tokenizer.json has 34 MB.
const MAX_FILE_BYTES: u64 = 128 << 20;

/// The files' contents; only tokenizer.json must be there.
#[derive(Clone, Debug, Default)]
pub struct HfFiles {
    pub tokenizer: Vec<u8>,
    pub tokenizer_config: Value,
    pub special_tokens_map: Value,
    pub generation_config: Value,
    /// chat_template.jinja
    pub chat_template: Option<String>,
}

/// A token in a configuration file: its text, or an object that holds it.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenName {
    Text(String),
    Object { content: String },
}

/// One of several named templates.
#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl HfFiles {
    /// Reads what is in `dir`. Errors: tokenizer.json is missing, or a file is unreadable, too large or not JSON.
    pub fn read(dir: &Path) -> Result<Self, TextError> {
        let json = |name| match read_optional(dir, name)? {
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|error| TextError::file(name, error)),
            None => Ok(Value::Null),
        };
        let template = read_optional(dir, "chat_template.jinja")?
            .map(String::from_utf8)
            .transpose()
            .map_err(|error| TextError::file("chat_template.jinja", error))?;
        Ok(Self {
            tokenizer: read_optional(dir, "tokenizer.json")?.ok_or(TextError::Missing {
                field: "tokenizer.json",
            })?,
            tokenizer_config: json("tokenizer_config.json")?,
            special_tokens_map: json("special_tokens_map.json")?,
            generation_config: json("generation_config.json")?,
            chat_template: template,
        })
    }

    /// Errors: tokenizer.json is malformed or its decoder is neither byte-level nor SentencePiece's.
    pub fn tokenizer(&self) -> Result<Tokenizer, TextError> {
        let json: Value = serde_json::from_slice(&self.tokenizer)
            .map_err(|error| TextError::file("tokenizer.json", error))?;
        let prefix = json.pointer("/model/continuing_subword_prefix");
        if prefix
            .and_then(Value::as_str)
            .is_some_and(|prefix| !prefix.is_empty())
        {
            return Err(TextError::Unsupported {
                field: "model.continuing_subword_prefix",
                value: "not empty".to_owned(),
                supported: "none".to_owned(),
            });
        }
        let decoder = Decoder::of(&json["decoder"])?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&self.tokenizer)
            .map_err(|error| TextError::file("tokenizer.json", error))?;
        // Limits are the server's business, and they refuse instead of cutting.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| TextError::file("tokenizer.json", error))?;
        let vocab = inner.get_vocab(true);
        Ok(Tokenizer {
            table: table(&inner, &vocab, decoder.encoding)?.into(),
            special: self.special_tokens(&vocab)?,
            inner,
            prefix: None,
            suffix: None,
            strips_first_space: decoder.strips_first_space,
        })
    }

    /// The chat template: chat_template.jinja, or tokenizer_config.json's (the one named `default` of several).
    pub fn chat_template(&self) -> Result<Option<String>, TextError> {
        if self.chat_template.is_some() {
            return Ok(self.chat_template.clone());
        }
        match &self.tokenizer_config["chat_template"] {
            Value::String(template) => Ok(Some(template.clone())),
            _ => self.named_template("default"),
        }
    }

    /// The template of conversations with tools, where the model has one of its own: the one named `tool_use` of several.
    pub fn tool_template(&self) -> Result<Option<String>, TextError> {
        if self.chat_template.is_some() {
            return Ok(None);
        }
        self.named_template("tool_use")
    }

    fn named_template(&self, name: &str) -> Result<Option<String>, TextError> {
        let several = &self.tokenizer_config["chat_template"];
        if several.is_null() || several.is_string() {
            return Ok(None);
        }
        let templates: Vec<NamedTemplate> = Deserialize::deserialize(several)
            .map_err(|error| TextError::file("tokenizer_config.json", error))?;
        let named = templates.into_iter().find(|template| template.name == name);
        Ok(named.map(|template| template.template))
    }

    fn special_tokens(&self, vocab: &HashMap<String, u32>) -> Result<SpecialTokens, TextError> {
        let id = |token: &Option<String>| token.as_ref().and_then(|token| vocab.get(token).copied());
        let (bos_token, eos_token) = (self.token_name("bos_token")?, self.token_name("eos_token")?);
        let eos = id(&eos_token);
        let mut end_of_generation = eos_ids(&self.generation_config["eos_token_id"])?;
        end_of_generation.extend(eos);
        end_of_generation.sort_unstable();
        end_of_generation.dedup();
        Ok(SpecialTokens {
            bos: id(&bos_token),
            eos,
            end_of_generation,
            bos_token,
            eos_token,
            unk_token: self.token_name("unk_token")?,
            pad_token: self.token_name("pad_token")?,
        })
    }

    fn token_name(&self, key: &str) -> Result<Option<String>, TextError> {
        for (file, json) in [
            ("tokenizer_config.json", &self.tokenizer_config),
            ("special_tokens_map.json", &self.special_tokens_map),
        ] {
            if !json[key].is_null() {
                let name = TokenName::deserialize(&json[key])
                    .map_err(|error| TextError::file(file, format!("{key}: {error}")))?;
                return Ok(Some(match name {
                    TokenName::Text(text) => text,
                    TokenName::Object { content } => content,
                }));
            }
        }
        Ok(None)
    }
}

/// `eos_token_id`: nothing, one id, or a list.
fn eos_ids(json: &Value) -> Result<Vec<u32>, TextError> {
    let parsed = match json {
        Value::Null => return Ok(Vec::new()),
        Value::Array(_) => Vec::<u32>::deserialize(json),
        _ => u32::deserialize(json).map(|id| vec![id]),
    };
    parsed.map_err(|error| TextError::file("generation_config.json", format!("eos_token_id: {error}")))
}

/// What tokenizer.json's decoder says about the spelling of its vocabulary.
struct Decoder {
    encoding: TokenEncoding,
    strips_first_space: bool,
}

impl Decoder {
    fn of(json: &Value) -> Result<Self, TextError> {
        let kind = |step: &Value| step["type"].as_str().unwrap_or("none").to_owned();
        let steps = match json["decoders"].as_array() {
            Some(steps) if kind(json) == "Sequence" => steps.as_slice(),
            _ => std::slice::from_ref(json),
        };
        let kinds: Vec<String> = steps.iter().map(kind).collect();
        let has = |name: &str| kinds.iter().any(|kind| kind == name);
        if has("ByteLevel") {
            return Ok(Self {
                encoding: TokenEncoding::ByteLevel,
                strips_first_space: false,
            });
        }
        if has("ByteFallback") || has("Metaspace") {
            let never = steps.iter().any(|step| step["prepend_scheme"] == "never");
            return Ok(Self {
                encoding: TokenEncoding::BytePieces,
                strips_first_space: has("Strip") || (has("Metaspace") && !never),
            });
        }
        Err(TextError::Unsupported {
            field: "decoder of tokenizer.json",
            value: kinds.join(", "),
            supported: "ByteLevel, ByteFallback, Metaspace".to_owned(),
        })
    }
}

fn table(
    inner: &tokenizers::Tokenizer,
    vocab: &HashMap<String, u32>,
    encoding: TokenEncoding,
) -> Result<TokenTable, TextError> {
    let added = inner.get_added_tokens_decoder();
    let highest = vocab.values().copied().max().unwrap_or(0) as usize;
    TextError::check_limit("highest token id", highest, MAX_VOCAB_SIZE - 1)?;
    let mut texts: Vec<Option<&str>> = vec![None; highest + 1];
    for (text, &id) in vocab {
        texts[id as usize] = Some(text);
    }
    let entries = texts
        .iter()
        .enumerate()
        .map(|(id, &text)| match added.get(&(id as u32)) {
            Some(token) => Some(TokenEntry {
                text: &token.content,
                kind: if token.special {
                    EntryKind::Special
                } else {
                    EntryKind::Added
                },
            }),
            None => text.map(|text| TokenEntry {
                text,
                kind: EntryKind::Ordinary,
            }),
        });
    TokenTable::build(encoding, entries)
}

/// The file's bytes; none if there is no such file.
fn read_optional(dir: &Path, name: &str) -> Result<Option<Vec<u8>>, TextError> {
    match read_file(&dir.join(name)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(TextError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A whole file of a model's text side. Errors: it is unreadable or too large.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>, TextError> {
    let read = || {
        let mut bytes = Vec::new();
        // One byte more than allowed tells a file that is too large from one that just fits.
        fs::File::open(path)?
            .take(MAX_FILE_BYTES + 1)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|source| TextError::Io {
        path: path.to_owned(),
        source,
    })?;
    TextError::check_limit("bytes of a tokenizer file", bytes.len(), MAX_FILE_BYTES as usize)?;
    Ok(bytes)
}

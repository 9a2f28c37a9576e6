//! The tokenizer by itself: text to tokens and back, for clients that count or cut.

use phalanx_proto::{ErrorKind, RpcError, v1};
use serde_json::{Map, Value, json};

use super::{SpecialTokens, TextProcessor};

/// Ids without a token among the spellings.
const NO_TOKEN: &str = "";

impl TextProcessor {
    /// Tokenizes a text or a rendered conversation, whose length is bounded as that of a prompt. Errors name the field
    /// to blame; `QueueFull` when too many prompts wait to be tokenized.
    pub async fn tokenize(&self, request: v1::TokenizeRequest) -> Result<v1::TokenizeResponse, RpcError> {
        let token_ids = match request.input {
            None => {
                return Err(RpcError::invalid(
                    "prompt",
                    "Either prompt or messages must be given.",
                ));
            }
            Some(v1::tokenize_request::Input::Text(text)) => {
                self.check_bytes(text.len(), "prompt")?;
                self.encode(text, request.add_special_tokens.unwrap_or(true))
                    .await?
            }
            Some(v1::tokenize_request::Input::Chat(mut chat)) => {
                chat.add_special_tokens |= request.add_special_tokens.unwrap_or(false);
                self.render(chat).await?.0
            }
        };
        let spelled = if request.return_token_strs {
            &token_ids[..]
        } else {
            &[]
        };
        let spelling = |&id: &u32| self.tokenizer.spelling(id).unwrap_or_else(|| NO_TOKEN.to_owned());
        Ok(v1::TokenizeResponse {
            token_strs: spelled.iter().map(spelling).collect(),
            token_ids,
            max_model_len: self.limits().max_model_len,
        })
    }

    /// The text of token ids, special tokens included. Errors: an id outside the vocabulary; more ids than the context
    /// has tokens; `QueueFull`.
    pub async fn detokenize(&self, token_ids: Vec<u32>) -> Result<String, RpcError> {
        const PARAM: &str = "tokens";
        let limit = self.limits().max_model_len as usize;
        if token_ids.len() > limit {
            let message = format!(
                "This model's maximum context length is {limit} tokens. However, your request has {} tokens.",
                token_ids.len()
            );
            return Err(RpcError::new(ErrorKind::ContextLengthExceeded, message).with_param(PARAM));
        }
        self.check_vocabulary(&token_ids, PARAM)?;
        let tokenizer = self.tokenizer.clone();
        self.pool
            .run(move || Ok(tokenizer.decode(&token_ids, false)))
            .await
    }

    /// A JSON object in the terms of tokenizer_config.json.
    pub fn tokenizer_info(&self) -> &str {
        &self.tokenizer_info
    }
}

/// What a GGUF file's metadata says, in the terms of tokenizer_config.json.
pub(super) fn config_of(special: &SpecialTokens) -> Value {
    json!({
        "bos_token": special.bos_token,
        "eos_token": special.eos_token,
        "unk_token": special.unk_token,
        "pad_token": special.pad_token,
    })
}

/// The object of `/tokenizer_info`: the configuration without the names of files, with the template in use.
pub(super) fn info(config: Value, template: Option<&str>) -> String {
    let mut info = match config {
        Value::Object(fields) => fields,
        // The file is not there, or holds something else.
        _ => Map::new(),
    };
    for file in ["vocab_file", "merges_file", "tokenizer_file"] {
        info.remove(file);
    }
    info.entry("tokenizer_class")
        .or_insert_with(|| "PreTrainedTokenizerFast".into());
    if let Some(template) = template {
        info.insert("chat_template".to_owned(), template.into());
    }
    Value::Object(info).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_info_has_a_class_and_the_template_but_no_files() {
        let config =
            json!({"vocab_file": "/models/vocab.json", "add_bos_token": true, "chat_template": "old"});
        let info: Value = serde_json::from_str(&info(config, Some("new"))).expect("JSON");
        let expected = json!({
            "add_bos_token": true,
            "chat_template": "new",
            "tokenizer_class": "PreTrainedTokenizerFast",
        });
        assert_eq!(info, expected);
        assert_eq!(
            super::info(Value::Null, None),
            r#"{"tokenizer_class":"PreTrainedTokenizerFast"}"#
        );
    }
}

//! What each field of each body is: type, range and meaning.

use serde_json::{Map, Value, json};

/// A field's name, its JSON schema, and what it is for. `null` stands for absent everywhere.
pub(super) type Field = (&'static str, &'static str, &'static str);

/// The schema of an object that a route reads.
pub(crate) struct Schema {
    pub(super) name: &'static str,
    /// What its deserializers know.
    #[cfg_attr(not(test), expect(dead_code, reason = "the tests compare the tables with it"))]
    pub(super) accepted: fn() -> Vec<&'static str>,
    pub(super) required: &'static [&'static str],
    pub(super) tables: &'static [&'static [Field]],
}

impl Schema {
    pub(super) fn fields(&self) -> impl Iterator<Item = &'static Field> {
        self.tables.iter().copied().flatten()
    }

    pub(super) fn json(&self) -> Value {
        let properties: Map<String, Value> = self.fields().map(property).collect();
        json!({"type": "object", "properties": properties, "required": self.required})
    }
}

/// A field as a named property.
///
/// # Panics
/// If the table holds a schema that is not a JSON object, which the tests read all of.
pub(super) fn property((name, schema, description): &Field) -> (String, Value) {
    let mut schema: Map<String, Value> = serde_json::from_str(schema).expect("the tables hold JSON objects");
    schema.insert("description".to_owned(), (*description).into());
    ((*name).to_owned(), schema.into())
}

/// Schemas that no body has for its own.
pub(super) fn shared() -> Map<String, Value> {
    let string = json!({"type": "string"});
    let shared = json!({
        "Error": {
            "type": "object",
            "required": ["error"],
            "properties": {"error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": string,
                    "type": string,
                    "param": {"type": ["string", "null"], "description": "The field of the request that is to blame."},
                    "code": string,
                },
            }},
        },
        "TgiError": {
            "type": "object",
            "required": ["error", "error_type"],
            "properties": {"error": string, "error_type": string},
        },
        "AnthropicError": {
            "type": "object",
            "required": ["type", "error"],
            "properties": {"type": {"const": "error"}, "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": string, "message": string},
            }},
        },
        "Message": {
            "type": "object",
            "required": ["role"],
            "properties": {
                "role": string,
                "content": {"type": ["string", "array", "null"], "items": {"type": ["object", "string"]}},
                "name": {"type": ["string", "null"]},
                "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
                "tool_call_id": {"type": ["string", "null"]},
                "reasoning": {"type": ["string", "null"]},
            },
        },
    });
    match shared {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

const TEXT: &str = r#"{"type": ["string", "null"]}"#;
const FLAG: &str = r#"{"type": ["boolean", "null"]}"#;
const COUNT: &str = r#"{"type": ["integer", "null"], "minimum": 0, "maximum": 4294967295}"#;
const NUMBER: &str = r#"{"type": ["number", "null"]}"#;
const PENALTY: &str = r#"{"type": ["number", "null"], "minimum": -2, "maximum": 2}"#;
const SHARE: &str = r#"{"type": ["number", "null"], "minimum": 0, "maximum": 1}"#;
const SEED: &str =
    r#"{"type": ["integer", "null"], "minimum": -9223372036854775808, "maximum": 18446744073709551615}"#;
const IDS: &str =
    r#"{"type": ["array", "null"], "items": {"type": "integer", "minimum": 0, "maximum": 4294967295}}"#;
const LIST: &str = r#"{"type": ["array", "null"], "items": {"type": "object"}}"#;
const OBJECT: &str = r#"{"type": ["object", "null"]}"#;
const REPETITION: &str = r#"{"type": ["object", "null"], "properties": {
    "max_pattern_size": {"type": "integer", "minimum": 0, "maximum": 512},
    "min_pattern_size": {"type": "integer", "minimum": 0, "maximum": 512},
    "min_count": {"type": "integer", "minimum": 0, "maximum": 1024}}}"#;
const MESSAGES: &str =
    r##"{"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Message"}}"##;

/// Who is asked, how it answers, and in which order.
#[rustfmt::skip]
pub(super) const PLACE: &[Field] = &[
    ("model", TEXT, "A served model name; the server has one model, so that it may be left out."),
    ("stream", FLAG, "Answer with server-sent events."),
    ("stream_options", OBJECT, "`include_usage` and `continuous_usage_stats`; only together with `stream`."),
    ("priority", r#"{"type": ["integer", "null"], "minimum": -2147483648, "maximum": 2147483647}"#,
        "Smaller is more urgent; anything but 0 needs a server with `--scheduling-policy priority`."),
    ("timeout", r#"{"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 86400}"#, "Seconds that the client waits."),
    ("cache_salt", TEXT, "Prompts share cached prefixes only with prompts of the same salt."),
];

pub(super) const USER: &[Field] = &[(
    "user",
    TEXT,
    "Names the session of a request without `X-Session-Id`.",
)];

pub(super) const CHOICES: &[Field] = &[(
    "n",
    r#"{"type": ["integer", "null"], "minimum": 1, "maximum": 128}"#,
    "Completions of each prompt.",
)];

#[rustfmt::skip]
pub(super) const SAMPLING: &[Field] = &[
    ("temperature", r#"{"type": ["number", "null"], "minimum": 0}"#, "0: greedy."),
    ("top_p", SHARE, "Draw from the most probable tokens that have this share together."),
    ("top_k", r#"{"type": ["integer", "null"], "minimum": -1, "maximum": 4294967295}"#,
        "Draw from so many of the most probable tokens; 0 and -1: from all."),
    ("min_p", SHARE, "Draw from tokens at least so probable as this share of the most probable one."),
    ("presence_penalty", PENALTY, "Against tokens that are there already."),
    ("frequency_penalty", PENALTY, "Against tokens by how often they are there."),
    ("repetition_penalty", r#"{"type": ["number", "null"], "exclusiveMinimum": 0}"#,
        "Divides the logits of tokens of prompt and output; 1: off."),
    ("seed", SEED, "The same seed gives the same tokens."),
    ("min_tokens", COUNT, "No stop token ends the text earlier."),
    ("stop", r#"{"type": ["string", "array", "null"], "items": {"type": "string"}, "maxItems": 64}"#,
        "Texts that end the completion."),
    ("stop_token_ids", IDS, "Tokens that end the completion."),
    ("ignore_eos", FLAG, "The end-of-sequence token does not end the completion."),
    ("include_stop_str_in_output", FLAG, "The text that ended the completion is part of it."),
    ("skip_special_tokens", FLAG, "Leave control tokens out of the text; the default."),
    ("logit_bias", r#"{"type": ["object", "null"], "additionalProperties": {"type": "number"}, "maxProperties": 512}"#,
        "Added to the logits of token ids, -100 to 100."),
    ("repetition_detection", REPETITION,
        "Ends the completion once it ends with some pattern of tokens `min_count` times in a row."),
    ("thinking_token_budget", r#"{"type": ["integer", "null"], "minimum": -1, "maximum": 9223372036854775807}"#,
        "Most tokens of reasoning; -1: no limit. Needs a server with `--reasoning-parser`."),
];

/// What a completion is held to.
#[rustfmt::skip]
pub(super) const STRUCTURED: &[Field] = &[
    ("response_format", OBJECT, "`type` is text, json_object, json_schema (with `json_schema.schema`) or structural_tag."),
    ("structured_outputs", OBJECT, "One of `json`, `json_object`, `regex`, `choice`, `grammar` and `structural_tag`."),
    ("guided_json", r#"{"type": ["object", "string", "boolean", "null"]}"#, "A JSON schema."),
    ("guided_json_object", FLAG, "Any JSON object."),
    ("guided_regex", TEXT, "A regular expression for the whole text."),
    ("guided_choice", r#"{"type": ["array", "null"], "items": {"type": "string"}, "maxItems": 4096}"#, "One of these texts."),
    ("guided_grammar", TEXT, "A grammar in Lark's notation or in EBNF."),
    ("guided_whitespace_pattern", TEXT, "A regular expression for the space between JSON's tokens."),
    ("allowed_token_ids", r#"{"type": ["array", "null"], "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 4294967295}}"#,
        "Nothing but these tokens."),
    ("bad_words", r#"{"type": ["array", "null"], "items": {"type": "string"}, "maxItems": 128}"#, "Words that do not appear."),
];

#[rustfmt::skip]
pub(super) const CHAT: &[Field] = &[
    ("messages", MESSAGES, "The conversation."),
    ("max_tokens", COUNT, "Most tokens of the answer; without it, as many as fit."),
    ("max_completion_tokens", COUNT, "The same; wins over `max_tokens`."),
    ("logprobs", FLAG, "Report the tokens' log-probabilities."),
    ("top_logprobs", COUNT, "Alternatives reported for each token; needs `logprobs`."),
    ("add_generation_prompt", FLAG, "Whether the template opens the assistant's turn; the default."),
    ("continue_final_message", FLAG, "The answer goes on where the last message ends."),
    ("chat_template", TEXT, "Jinja instead of the server's template; needs `--trust-request-chat-template`."),
    ("chat_template_kwargs", OBJECT, "More variables for the template."),
    ("documents", LIST, "The template's `documents`."),
    ("tools", LIST, "What the model may call."),
    ("tool_choice", r#"{"type": ["string", "object", "null"]}"#, "`none`, `auto`, `required`, or the function to call."),
    ("parallel_tool_calls", FLAG, "Whether there may be several calls; the default."),
    ("include_reasoning", FLAG, "Whether the model's reasoning is told; the default."),
    ("reasoning_effort", TEXT, "The template's variable of this name."),
];

#[rustfmt::skip]
pub(super) const RESPONSES: &[Field] = &[
    ("input", r#"{"type": ["string", "array"], "minItems": 1, "items": {"type": "object"}}"#,
        "A text, or items: messages, reasoning, function calls and their outputs."),
    ("instructions", TEXT, "The system prompt; not carried over to responses that go on from this one."),
    ("previous_response_id", TEXT, "Goes on from a stored response."),
    ("max_output_tokens", COUNT, "Most tokens of the answer; without it, as many as fit."),
    ("include", r#"{"type": ["array", "null"], "items": {"type": "string"}, "maxItems": 32}"#,
        "`message.output_text.logprobs`; the other names of OpenAI's add nothing."),
    ("top_logprobs", COUNT, "Alternatives reported for each token; needs the log-probabilities in `include`."),
    ("text", OBJECT, "`format` is what the answer's text must look like."),
    ("tools", LIST, "Functions that the model may call."),
    ("tool_choice", r#"{"type": ["string", "object", "null"]}"#, "`none`, `auto`, `required`, or the function to call."),
    ("parallel_tool_calls", FLAG, "Whether there may be several calls; the default."),
    ("max_tool_calls", COUNT, "Of tools that the server runs, of which there are none."),
    ("reasoning", OBJECT, "`effort` is the template's variable `reasoning_effort`; `summary` adds nothing."),
    ("include_reasoning", FLAG, "Whether the model's reasoning is told; the default."),
    ("truncation", r#"{"enum": ["auto", "disabled", null]}"#, "`auto`: of a prompt that is too long the beginning is left out."),
    ("store", FLAG, "Keep the response, on a server that stores any; the default."),
    ("background", FLAG, "Answer at once, and make the response whoever listens; on a server that stores responses."),
    ("metadata", r#"{"type": ["object", "null"], "additionalProperties": {"type": "string"}}"#, "Repeated in the response, as are the next two."),
    ("prompt_cache_key", TEXT, "Not looked at."),
    ("safety_identifier", TEXT, "Not looked at."),
    ("service_tier", TEXT, "Not looked at."),
    ("request_id", TEXT, "The response's id, instead of one made here."),
    ("chat_template_kwargs", OBJECT, "More variables for the template."),
];

/// Of the query of a response that is stored.
#[rustfmt::skip]
pub(super) const RESPONSE: &[Field] = &[
    ("stream", r#"{"type": "boolean", "default": false}"#, "The events of one that was created with `background` and `stream`."),
    ("starting_after", r#"{"type": "integer", "minimum": 0}"#, "Only the events after this sequence number."),
];

#[rustfmt::skip]
pub(super) const PROMPT: &[Field] = &[
    ("prompt", r#"{"type": ["string", "array"], "items": {"type": ["string", "integer", "array"]}}"#,
        "A text, token ids, or a list of either."),
];

/// vLLM's own of chats and of completions.
#[rustfmt::skip]
pub(super) const OUTPUT: &[Field] = &[
    ("prompt_logprobs", COUNT, "Alternatives reported for each token of the prompt; not in streams."),
    ("return_token_ids", FLAG, "Report the token ids of prompt and completion."),
    ("return_tokens_as_token_ids", FLAG, "Log-probabilities name tokens as `token_id:7`."),
    ("truncate_prompt_tokens", r#"{"type": ["integer", "null"], "minimum": -1, "maximum": 2147483647}"#,
        "Keep so many of the prompt's last tokens; -1: as many as leave room for the completion."),
];

/// Of chats and of completions.
#[rustfmt::skip]
pub(super) const TEXT_OPTIONS: &[Field] = &[
    ("echo", FLAG, "The prompt, or the last message, comes first in the text."),
    ("add_special_tokens", FLAG, "Whether the tokenizer adds its special tokens; true for a prompt, false for a conversation."),
];

/// Of completions, and of `sampling_params`.
#[rustfmt::skip]
pub(super) const COMPLETIONS: &[Field] = &[
    ("max_tokens", COUNT, "Most tokens of each completion; 16 without it, as many as fit with `null`."),
    ("logprobs", COUNT, "Alternatives reported for each token."),
];

/// Of chats, of completions, and of `sampling_params`.
#[rustfmt::skip]
pub(super) const LISTED: &[Field] = &[
    ("logprob_token_ids", r#"{"type": ["array", "null"], "maxItems": 128, "items": {"type": "integer", "minimum": 0, "maximum": 4294967295}}"#,
        "Tokens reported beside each token of the completion, in place of the most probable; needs `logprobs`."),
];

/// What both of Anthropic's routes read.
#[rustfmt::skip]
pub(super) const CONVERSATION: &[Field] = &[
    ("model", r#"{"type": "string"}"#, "A served model name."),
    ("messages", MESSAGES, "The conversation, of user and assistant."),
    ("system", r#"{"type": ["string", "array", "null"], "items": {"type": ["object", "string"]}}"#, "The system prompt."),
    ("chat_template_kwargs", OBJECT, "More variables for the template."),
    ("thinking", OBJECT, "Not offered but as disabled."),
    ("tools", LIST, "What the model may call."),
    ("tool_choice", OBJECT, "Whether it may, must or must not call: `type` is auto, any, tool or none."),
];

#[rustfmt::skip]
pub(super) const MESSAGES_API: &[Field] = &[
    ("max_tokens", r#"{"type": "integer", "minimum": 1, "maximum": 4294967295}"#, "Most tokens of the answer."),
    ("stop_sequences", r#"{"type": ["array", "null"], "items": {"type": "string"}, "maxItems": 64}"#, "Texts that end the answer."),
    ("stream", FLAG, "Answer with server-sent events."),
    ("temperature", r#"{"type": ["number", "null"], "minimum": 0}"#, "0: greedy."),
    ("top_k", r#"{"type": ["integer", "null"], "minimum": -1, "maximum": 4294967295}"#, "Draw from so many of the most probable tokens."),
    ("top_p", SHARE, "Draw from the most probable tokens that have this share together."),
    ("metadata", OBJECT, "Not looked at."),
    ("service_tier", TEXT, "Not looked at."),
];

#[rustfmt::skip]
pub(super) const GENERATE: &[Field] = &[
    ("request_id", TEXT, "Names the request, after the prefix `generate-tokens-`; wins over `X-Request-Id`."),
    ("token_ids", r#"{"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 4294967295}}"#,
        "The prompt."),
    ("sampling_params", r##"{"$ref": "#/components/schemas/SamplingParams"}"##, "How tokens are drawn."),
];

#[rustfmt::skip]
pub(super) const ABORT: &[Field] = &[
    ("request_ids", r#"{"type": ["array", "null"], "items": {"type": "string"}, "maxItems": 1024}"#,
        "Ids as replies carry them."),
];

#[rustfmt::skip]
pub(super) const TOKENIZE: &[Field] = &[
    ("model", TEXT, "A served model name."),
    ("prompt", TEXT, "A text to tokenize; or give `messages`."),
    ("messages", r##"{"type": ["array", "null"], "items": {"$ref": "#/components/schemas/Message"}}"##,
        "A conversation to render and tokenize; or give `prompt`."),
    ("add_special_tokens", FLAG, "Whether the tokenizer adds its special tokens; true for a text, false for a conversation."),
    ("return_token_strs", FLAG, "Also tell how the vocabulary spells the tokens."),
    ("add_generation_prompt", FLAG, "Whether the template opens the assistant's turn; the default."),
    ("continue_final_message", FLAG, "The last message is left open."),
    ("chat_template", TEXT, "Jinja instead of the server's template; needs `--trust-request-chat-template`."),
    ("chat_template_kwargs", OBJECT, "More variables for the template."),
    ("tools", LIST, "What the model may call."),
];

#[rustfmt::skip]
pub(super) const DETOKENIZE: &[Field] = &[
    ("model", TEXT, "A served model name."),
    ("tokens", r#"{"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 4294967295}}"#, "Token ids."),
];

#[rustfmt::skip]
pub(super) const TGI: &[Field] = &[
    ("inputs", r#"{"type": "string"}"#, "The prompt."),
    ("parameters", r##"{"oneOf": [{"type": "null"}, {"$ref": "#/components/schemas/TgiParameters"}]}"##, "How tokens are drawn."),
    ("stream", FLAG, "At `/` only: answer with server-sent events."),
];

#[rustfmt::skip]
pub(super) const TGI_PARAMETERS: &[Field] = &[
    ("temperature", r#"{"type": ["number", "null"], "exclusiveMinimum": 0}"#, "Anything but 1 draws tokens."),
    ("repetition_penalty", r#"{"type": ["number", "null"], "exclusiveMinimum": 0}"#, "Divides the logits of tokens that are there already."),
    ("frequency_penalty", PENALTY, "Against tokens by how often they are there."),
    ("top_k", r#"{"type": ["integer", "null"], "minimum": 1, "maximum": 4294967295}"#, "Draw from so many of the most probable tokens."),
    ("top_p", SHARE, "Draw from the most probable tokens that have this share together."),
    ("do_sample", FLAG, "Draw tokens; otherwise greedy, unless another parameter asks for more."),
    ("max_new_tokens", COUNT, "Most tokens; 100 without it, as many as fit with `null`."),
    ("return_full_text", FLAG, "The prompt comes first in the text."),
    ("stop", r#"{"type": ["array", "null"], "items": {"type": "string"}, "maxItems": 64}"#, "Texts that end the completion, and are part of it."),
    ("details", FLAG, "Report tokens and how the text ended."),
    ("seed", r#"{"type": ["integer", "null"], "minimum": 0, "maximum": 18446744073709551615}"#, "The same seed gives the same tokens."),
    ("top_n_tokens", COUNT, "Alternatives reported for each token."),
    ("grammar", r#"{"type": ["object", "null"], "properties": {"type": {"enum": ["json", "regex"]}, "value": {}}}"#,
        "What the text is held to: a JSON schema or a regular expression."),
    ("adapter_id", r#"{}"#, "Not offered."),
    ("best_of", COUNT, "Not offered but as 1."),
    ("decoder_input_details", FLAG, "Not offered but as false."),
    ("truncate", COUNT, "Not offered."),
    ("typical_p", NUMBER, "Not offered but as 1."),
    ("watermark", FLAG, "Not offered but as false."),
];

#[rustfmt::skip]
pub(super) const PAUSE: &[Field] = &[
    ("mode", r#"{"enum": ["abort", "wait", "keep"], "default": "abort"}"#,
        "Requests in flight are aborted, go on to their end, or stand still until the pause ends."),
    ("wait_for_inflight_requests", r#"{"type": "boolean", "default": false}"#, "The older name of `mode=wait`."),
    ("clear_cache", r#"{"type": "boolean", "default": true}"#, "Also reset the prefix cache; not with `mode=keep`."),
];

#[rustfmt::skip]
pub(super) const RESET: &[Field] = &[
    ("reset_running_requests", r#"{"type": "boolean", "default": false}"#, "Requests that are running are computed again."),
    ("reset_external", r#"{"type": "boolean", "default": false}"#, "There is no external cache."),
];

pub(super) const SERVER_INFO: &[Field] = &[(
    "config_format",
    r#"{"enum": ["text", "json"], "default": "text"}"#,
    "Whether the configuration is a text or an object.",
)];

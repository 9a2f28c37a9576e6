//! Fields of the API that this server does not offer: refused by name, unless their value asks for nothing.
//!
//! Ignoring them would answer another question than the one asked. Fields that nobody knows are ignored, as vLLM does.

use std::{fmt, marker::PhantomData};

use phalanx_proto::RpcError;
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

use super::body::parse;

/// A field, and the values beside `null` that ask for nothing, as compact JSON.
type Field = (&'static str, &'static [&'static str]);

/// Bytes, with room for spaces.
const MAX_NO_OP: usize = 64;

const BOTH: &[Field] = &[
    ("best_of", &["1"]),
    ("kv_transfer_params", &[]),
    ("logits_processors", &["[]"]),
    ("use_beam_search", &["false"]),
];

const CHAT: &[Field] = &[
    ("audio", &[]),
    ("function_call", &[r#""none""#, r#""auto""#]),
    ("functions", &["[]"]),
    ("mm_processor_kwargs", &["{}"]),
    ("modalities", &[r#"["text"]"#]),
    ("web_search_options", &[]),
];

const COMPLETIONS: &[Field] = &[("prompt_embeds", &["[]"]), ("suffix", &[r#""""#])];

const RESPONSES: &[Field] = &[
    ("conversation", &[]),
    ("enable_response_messages", &["false"]),
    ("logprob_token_ids", &["[]"]),
    ("media_io_kwargs", &["{}"]),
    ("mm_processor_kwargs", &["{}"]),
    ("previous_input_messages", &["[]"]),
    ("prompt", &[]),
];

/// Of `/inference/v1/generate`, beside its `sampling_params`.
const TOKENS: &[Field] = &[("features", &[]), ("kv_transfer_params", &[])];

/// Of `sampling_params`.
const SAMPLING: &[Field] = &[("prompt_logprobs", &[]), ("truncate_prompt_tokens", &[])];

const TOKENIZE: &[Field] = &[("mm_processor_kwargs", &["{}"])];

/// The lists of a route, as a type that serde can be given.
trait Lists {
    const LISTS: [&'static [Field]; 2];
}

enum Chat {}
enum Completions {}
enum Responses {}
enum Tokens {}
enum Sampling {}
enum Tokenize {}

impl Lists for Chat {
    const LISTS: [&'static [Field]; 2] = [BOTH, CHAT];
}

impl Lists for Completions {
    const LISTS: [&'static [Field]; 2] = [BOTH, COMPLETIONS];
}

impl Lists for Responses {
    const LISTS: [&'static [Field]; 2] = [BOTH, RESPONSES];
}

impl Lists for Tokens {
    const LISTS: [&'static [Field]; 2] = [&[], TOKENS];
}

impl Lists for Sampling {
    const LISTS: [&'static [Field]; 2] = [BOTH, SAMPLING];
}

impl Lists for Tokenize {
    const LISTS: [&'static [Field]; 2] = [&[], TOKENIZE];
}

/// # Errors
/// `InvalidArgument` naming the first field of a chat request that is not offered.
pub(super) fn refuse_for_chat(body: &[u8]) -> Result<(), RpcError> {
    refuse::<Chat>(body)
}

/// # Errors
/// `InvalidArgument` naming the first field of a completions request that is not offered.
pub(super) fn refuse_for_completions(body: &[u8]) -> Result<(), RpcError> {
    refuse::<Completions>(body)
}

/// # Errors
/// `InvalidArgument` naming the first field of a request for a response that is not offered.
pub(crate) fn refuse_for_responses(body: &[u8]) -> Result<(), RpcError> {
    refuse::<Responses>(body)
}

/// # Errors
/// `InvalidArgument` naming the first field of a request for tokens that is not offered.
pub(crate) fn refuse_for_tokens(body: &[u8]) -> Result<(), RpcError> {
    refuse::<Tokens>(body)
}

/// # Errors
/// `InvalidArgument` naming the first of the sampling parameters that is not offered.
pub(crate) fn refuse_for_sampling(body: &[u8]) -> Result<(), RpcError> {
    refuse::<Sampling>(body)
}

/// # Errors
/// `InvalidArgument` naming the first field of a request to tokenize that is not offered.
pub(crate) fn refuse_for_tokenize(body: &[u8]) -> Result<(), RpcError> {
    refuse::<Tokenize>(body)
}

fn refuse<L: Lists>(body: &[u8]) -> Result<(), RpcError> {
    match parse::<Found<L>>(body)?.0 {
        Some(field) => Err(RpcError::invalid(
            field,
            format!("{field} is not offered by this server"),
        )),
        None => Ok(()),
    }
}

/// The first field of an object that is not offered and not a no-op.
struct Found<L>(Option<&'static str>, PhantomData<L>);

impl<'de, L: Lists> Deserialize<'de> for Found<L> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FoundVisitor(PhantomData))
    }
}

struct FoundVisitor<L>(PhantomData<L>);

impl<'de, L: Lists> Visitor<'de> for FoundVisitor<L> {
    type Value = Found<L>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            let mut fields = L::LISTS.into_iter().flatten();
            let Some((name, no_ops)) = fields.find(|(name, _)| *name == key) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let value = map.next_value::<&RawValue>()?;
            if !asks_nothing(value, no_ops) && found.is_none() {
                found = Some(*name);
            }
        }
        Ok(Found(found, PhantomData))
    }
}

/// Compares without spaces. Long values are not looked into: no no-op is long.
fn asks_nothing(value: &RawValue, no_ops: &[&str]) -> bool {
    if value.get().len() > MAX_NO_OP {
        return false;
    }
    match serde_json::from_str::<Value>(value.get()) {
        Ok(value) => value.is_null() || no_ops.contains(&value.to_string().as_str()),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_ops_pass_and_the_rest_is_named() {
        let no_ops = br#"{"functions": [], "function_call": "auto", "logits_processors": [],
            "best_of": 1, "suffix": null, "somebody_elses": 3}"#;
        refuse_for_chat(no_ops).expect("asks for nothing");
        let refused = |body: &str| {
            refuse_for_chat(body.as_bytes())
                .expect_err(body)
                .param
                .expect("named")
        };
        assert_eq!(refused(r#"{"functions": [{}]}"#), "functions");
        assert_eq!(refused(r#"{"use_beam_search": true}"#), "use_beam_search");
        assert_eq!(refused(r#"{"best_of": 2, "functions": [1]}"#), "best_of");
        assert_eq!(refused(r#"{"\u0066unctions": [1]}"#), "functions");
    }

    #[test]
    fn the_two_routes_differ() {
        refuse_for_completions(br#"{"functions": [{}]}"#).expect("functions mean nothing");
        assert!(refuse_for_completions(br#"{"suffix": "x"}"#).is_err());
        assert!(refuse_for_chat(br#"{"functions": [{}]}"#).is_err());
        refuse_for_chat(br#"{"suffix": "x"}"#).expect("a suffix means nothing");
    }
}

//! What a reply tells of the prompt itself, in vLLM's shape.

use phalanx_proto::v1::{PromptOutput, TokenLogprob, TokenLogprobs};
use serde::{
    Serialize, Serializer,
    ser::{SerializeMap, SerializeSeq},
};

use super::{logprobs::number, output::Style};

/// The members of a chat reply, or of a completion's choice. What was not asked for is left out.
#[derive(Clone, Copy, Serialize)]
pub(super) struct PromptReply<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

impl<'a> PromptReply<'a> {
    pub(super) fn of(prompt: &'a PromptOutput, style: Style) -> Self {
        Self {
            prompt_logprobs: style.prompt_logprobs.then_some(PromptLogprobs(&prompt.logprobs)),
            prompt_token_ids: style.token_ids.then_some(prompt.token_ids.as_slice()),
        }
    }

    /// A later piece of a stream.
    pub(super) const NONE: Self = Self {
        prompt_logprobs: None,
        prompt_token_ids: None,
    };
}

/// A list with `null` for the first token, and for every other one an object from token ids to what is known of them.
#[derive(Clone, Copy)]
struct PromptLogprobs<'a>(&'a [TokenLogprobs]);

impl Serialize for PromptLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        for token in self.0 {
            let chosen = token.chosen.as_ref().filter(|chosen| !chosen.logprob.is_nan());
            let position = chosen.map(|chosen| Position {
                chosen,
                top: &token.top,
            });
            list.serialize_element(&position)?;
        }
        list.end()
    }
}

struct Position<'a> {
    chosen: &'a TokenLogprob,
    top: &'a [TokenLogprob],
}

#[derive(Serialize)]
struct Known<'a> {
    logprob: Option<f32>,
    rank: Option<u32>,
    decoded_token: &'a str,
}

impl Serialize for Position<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let others = self
            .top
            .iter()
            .filter(|other| other.token_id != self.chosen.token_id);
        let mut map = serializer.serialize_map(None)?;
        for token in std::iter::once(self.chosen).chain(others) {
            let known = Known {
                logprob: number(token.logprob),
                rank: token.rank,
                decoded_token: &token.token,
            };
            map.serialize_entry(&token.token_id, &known)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(token_id: u32, logprob: f32, rank: Option<u32>) -> TokenLogprob {
        TokenLogprob {
            token_id,
            token: format!("t{token_id}"),
            logprob,
            rank,
            ..TokenLogprob::default()
        }
    }

    #[test]
    fn the_first_token_is_null_and_a_token_is_there_once() {
        let first = TokenLogprobs {
            chosen: Some(token(5, f32::NAN, None)),
            ..TokenLogprobs::default()
        };
        let second = TokenLogprobs {
            chosen: Some(token(7, -0.5, Some(1))),
            top: vec![token(7, -0.5, Some(1)), token(9, -2.0, Some(2))],
            ..TokenLogprobs::default()
        };
        let json = serde_json::to_string(&PromptLogprobs(&[first, second])).expect("plain data");
        let expected = concat!(
            r#"[null,{"7":{"logprob":-0.5,"rank":1,"decoded_token":"t7"},"#,
            r#""9":{"logprob":-2.0,"rank":2,"decoded_token":"t9"}}]"#
        );
        assert_eq!(json, expected);
    }
}

//! Log-probabilities in the two shapes that OpenAI gave its two APIs.

use std::borrow::Cow;

use phalanx_proto::v1::{TokenLogprob, TokenLogprobs};
use serde::{Serialize, Serializer, ser::SerializeMap};

/// JSON has no infinities. vLLM's floor for a token that cannot be drawn.
const FLOOR: f32 = -9999.0;

/// `null` stands for a token without a log-probability: the first of an echoed prompt.
pub(super) fn number(logprob: f32) -> Option<f32> {
    (!logprob.is_nan()).then(|| logprob.clamp(FLOOR, 0.0))
}

/// How a token is called: by its text, or as `token_id:7`, for text that is not valid UTF-8 alone.
fn name(candidate: &TokenLogprob, as_ids: bool) -> Cow<'_, str> {
    if as_ids {
        format!("token_id:{}", candidate.token_id).into()
    } else {
        candidate.token.as_str().into()
    }
}

/// `choices[].logprobs` of chat completions.
#[derive(Serialize)]
pub(super) struct ChatLogprobs<'a> {
    content: ChatTokens<'a>,
}

/// The list in it, which is `logprobs` of Responses.
#[derive(Serialize)]
pub(crate) struct ChatTokens<'a>(Vec<ChatToken<'a>>);

#[derive(Serialize)]
struct ChatToken<'a> {
    #[serde(flatten)]
    chosen: ChatCandidate<'a>,
    top_logprobs: Vec<ChatCandidate<'a>>,
}

#[derive(Serialize)]
struct ChatCandidate<'a> {
    token: Cow<'a, str>,
    logprob: Option<f32>,
    bytes: &'a [u8],
}

impl<'a> ChatLogprobs<'a> {
    /// `as_ids`: tokens are named by their ids.
    pub(super) fn of(tokens: &'a [TokenLogprobs], as_ids: bool) -> Self {
        Self {
            content: ChatTokens::of(tokens, as_ids),
        }
    }
}

impl<'a> ChatTokens<'a> {
    /// `as_ids`: tokens are named by their ids.
    pub(crate) fn of(tokens: &'a [TokenLogprobs], as_ids: bool) -> Self {
        let tokens = tokens.iter().filter_map(|token| ChatToken::of(token, as_ids));
        Self(tokens.collect())
    }
}

impl<'a> ChatToken<'a> {
    fn of(token: &'a TokenLogprobs, as_ids: bool) -> Option<Self> {
        let candidate = |candidate| ChatCandidate::of(candidate, as_ids);
        Some(Self {
            chosen: candidate(token.chosen.as_ref()?),
            top_logprobs: token.top.iter().map(candidate).collect(),
        })
    }
}

impl<'a> ChatCandidate<'a> {
    fn of(candidate: &'a TokenLogprob, as_ids: bool) -> Self {
        Self {
            token: name(candidate, as_ids),
            logprob: number(candidate.logprob),
            bytes: &candidate.bytes,
        }
    }
}

/// `choices[].logprobs` of completions: parallel lists.
#[derive(Serialize)]
pub(super) struct CompletionLogprobs<'a> {
    text_offset: Vec<u32>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<Cow<'a, str>>,
    top_logprobs: Vec<Option<Top<'a>>>,
}

impl<'a> CompletionLogprobs<'a> {
    /// `as_ids`: tokens are named by their ids.
    pub(super) fn of(tokens: &'a [TokenLogprobs], as_ids: bool) -> Self {
        let chosen = || {
            tokens
                .iter()
                .filter_map(|token| Some((token, token.chosen.as_ref()?)))
        };
        Self {
            text_offset: chosen().map(|(token, _)| token.text_offset).collect(),
            token_logprobs: chosen().map(|(_, chosen)| number(chosen.logprob)).collect(),
            tokens: chosen().map(|(_, chosen)| name(chosen, as_ids)).collect(),
            top_logprobs: chosen()
                .map(|(token, chosen)| {
                    number(chosen.logprob)?;
                    Some(Top {
                        chosen,
                        others: &token.top,
                        as_ids,
                    })
                })
                .collect(),
        }
    }
}

/// An object from token text to log-probability: the chosen token and the alternatives. Of tokens with the same text
/// the first stays, as an object has each key once.
struct Top<'a> {
    chosen: &'a TokenLogprob,
    others: &'a [TokenLogprob],
    as_ids: bool,
}

impl Serialize for Top<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry(&name(self.chosen, self.as_ids), &number(self.chosen.logprob))?;
        for (index, candidate) in self.others.iter().enumerate() {
            let repeats = |earlier: &TokenLogprob| name(earlier, self.as_ids) == name(candidate, self.as_ids);
            if !repeats(self.chosen) && !self.others[..index].iter().any(repeats) {
                map.serialize_entry(&name(candidate, self.as_ids), &number(candidate.logprob))?;
            }
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(token: &str, logprob: f32) -> TokenLogprob {
        TokenLogprob {
            token_id: 1,
            token: token.to_owned(),
            logprob,
            bytes: token.as_bytes().to_vec(),
            rank: None,
            special: false,
        }
    }

    #[test]
    fn both_shapes() {
        let tokens = [
            TokenLogprobs {
                chosen: Some(candidate("a", f32::NAN)),
                top: vec![],
                text_offset: 0,
            },
            TokenLogprobs {
                chosen: Some(candidate("b", -0.5)),
                top: vec![
                    candidate("b", -0.5),
                    candidate("c", f32::NEG_INFINITY),
                    candidate("c", -1.0),
                ],
                text_offset: 1,
            },
        ];
        let json = serde_json::to_string(&CompletionLogprobs::of(&tokens, false)).expect("plain data");
        assert_eq!(
            json,
            r#"{"text_offset":[0,1],"token_logprobs":[null,-0.5],"tokens":["a","b"],"top_logprobs":[null,{"b":-0.5,"c":-9999.0}]}"#
        );
        let json = serde_json::to_string(&ChatLogprobs::of(&tokens[1..], false)).expect("plain data");
        assert_eq!(
            json,
            r#"{"content":[{"token":"b","logprob":-0.5,"bytes":[98],"top_logprobs":[{"token":"b","logprob":-0.5,"bytes":[98]},{"token":"c","logprob":-9999.0,"bytes":[99]},{"token":"c","logprob":-1.0,"bytes":[99]}]}]}"#
        );
    }

    /// Two tokens with one text are told apart.
    #[test]
    fn tokens_named_by_their_ids() {
        let mut other = candidate("a", -2.0);
        other.token_id = 2;
        let tokens = [TokenLogprobs {
            chosen: Some(candidate("a", -0.5)),
            top: vec![candidate("a", -0.5), other],
            text_offset: 3,
        }];
        let json = serde_json::to_string(&CompletionLogprobs::of(&tokens, true)).expect("plain data");
        assert_eq!(
            json,
            r#"{"text_offset":[3],"token_logprobs":[-0.5],"tokens":["token_id:1"],"top_logprobs":[{"token_id:1":-0.5,"token_id:2":-2.0}]}"#
        );
        let json = serde_json::to_value(ChatLogprobs::of(&tokens, true)).expect("plain data");
        let names = ["/content/0/token", "/content/0/top_logprobs/1/token"];
        assert_eq!(
            names.map(|at| json.pointer(at).and_then(|name| name.as_str())),
            [Some("token_id:1"), Some("token_id:2")]
        );
    }
}

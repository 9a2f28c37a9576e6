//! OpenAI's response object, and the items of its output.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{self, TokenLogprobs},
};
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use super::request::Truncation;
use crate::openai::logprobs::ChatTokens;

/// Of a response, or of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    Queued,
    InProgress,
    Completed,
    Incomplete,
    Failed,
    Cancelled,
}

/// A response as far as it is.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Reply {
    pub(super) id: String,
    object: &'static str,
    /// Unix seconds, as the next.
    created_at: i64,
    pub(super) completed_at: Option<i64>,
    pub(super) status: Status,
    pub(super) model: String,
    pub(super) output: Vec<Item>,
    pub(super) usage: Option<Usage>,
    pub(super) error: Option<Failure>,
    pub(super) incomplete_details: Option<Incomplete>,
    #[serde(flatten, serialize_with = "shared")]
    pub(super) echo: Arc<Echo>,
}

/// What a response repeats of its request.
#[derive(Debug, Serialize)]
pub(super) struct Echo {
    pub(super) background: bool,
    pub(super) instructions: Option<String>,
    pub(super) max_output_tokens: Option<u32>,
    pub(super) max_tool_calls: Option<u32>,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) parallel_tool_calls: bool,
    pub(super) previous_response_id: Option<String>,
    pub(super) prompt_cache_key: Option<String>,
    pub(super) reasoning: Reasoning,
    pub(super) safety_identifier: Option<String>,
    pub(super) service_tier: &'static str,
    pub(super) store: bool,
    pub(super) temperature: Option<f32>,
    pub(super) text: Box<RawValue>,
    pub(super) tool_choice: Box<RawValue>,
    pub(super) tools: Box<RawValue>,
    pub(super) top_logprobs: u32,
    pub(super) top_p: Option<f32>,
    pub(super) truncation: Truncation,
    pub(super) user: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct Reasoning {
    pub(super) effort: Option<String>,
    pub(super) summary: Option<String>,
}

fn shared<S: Serializer>(echo: &Arc<Echo>, serializer: S) -> Result<S::Ok, S::Error> {
    (**echo).serialize(serializer)
}

/// A piece of output.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Item {
    Reasoning {
        id: String,
        status: Status,
        /// Nothing is summed up here.
        summary: [(); 0],
        content: Vec<Part>,
    },
    Message {
        id: String,
        status: Status,
        role: &'static str,
        content: Vec<Part>,
    },
    FunctionCall {
        id: String,
        status: Status,
        call_id: String,
        name: String,
        arguments: String,
    },
}

/// The content of an item; each has one.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Part {
    ReasoningText {
        text: String,
    },
    OutputText {
        text: String,
        annotations: [(); 0],
        logprobs: Logprobs,
    },
}

/// Log-probabilities, empty unless they were asked for.
#[derive(Clone, Debug, Default)]
pub(super) struct Logprobs {
    pub(super) tokens: Vec<TokenLogprobs>,
    /// Tokens are named by their ids.
    pub(super) as_ids: bool,
}

impl Serialize for Logprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        ChatTokens::of(&self.tokens, self.as_ids).serialize(serializer)
    }
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Usage {
    input_tokens: u32,
    input_tokens_details: InputDetails,
    output_tokens: u32,
    output_tokens_details: OutputDetails,
    total_tokens: u32,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct InputDetails {
    cached_tokens: u32,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct OutputDetails {
    reasoning_tokens: u32,
}

/// Why a response failed.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Failure {
    code: &'static str,
    message: String,
}

/// Why a response is incomplete.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Incomplete {
    pub(super) reason: &'static str,
}

impl Reply {
    /// A response with this name that has nothing yet.
    pub(super) fn new(id: String, model: String, echo: Echo) -> Self {
        Self {
            id,
            object: "response",
            created_at: unix_seconds(),
            completed_at: None,
            status: Status::InProgress,
            model,
            output: Vec::new(),
            usage: None,
            error: None,
            incomplete_details: None,
            echo: Arc::new(echo),
        }
    }

    /// What was being written stays as it is.
    pub(super) fn cancel(&mut self) {
        self.status = Status::Cancelled;
        let items = self.output.iter_mut().map(Item::status_mut);
        items
            .filter(|status| **status == Status::InProgress)
            .for_each(|status| *status = Status::Incomplete);
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.status, Status::Queued | Status::InProgress)
    }

    /// Bytes of it as JSON.
    pub(super) fn bytes(&self) -> usize {
        // Fails only for maps with keys that are no strings, of which there are none.
        serde_json::to_vec(self).map_or(0, |json| json.len())
    }
}

impl Item {
    pub(super) fn id(&self) -> &str {
        match self {
            Self::Reasoning { id, .. } | Self::Message { id, .. } | Self::FunctionCall { id, .. } => id,
        }
    }

    pub(super) fn status_mut(&mut self) -> &mut Status {
        match self {
            Self::Reasoning { status, .. }
            | Self::Message { status, .. }
            | Self::FunctionCall { status, .. } => status,
        }
    }

    /// None for a call, which has arguments instead.
    pub(super) fn part(&self) -> Option<&Part> {
        match self {
            Self::Reasoning { content, .. } | Self::Message { content, .. } => content.first(),
            Self::FunctionCall { .. } => None,
        }
    }

    /// None for a call.
    pub(super) fn content_mut(&mut self) -> Option<&mut Vec<Part>> {
        match self {
            Self::Reasoning { content, .. } | Self::Message { content, .. } => Some(content),
            Self::FunctionCall { .. } => None,
        }
    }
}

impl Part {
    pub(super) fn text(&self) -> &str {
        match self {
            Self::ReasoningText { text } | Self::OutputText { text, .. } => text,
        }
    }

    pub(super) fn text_mut(&mut self) -> &mut String {
        match self {
            Self::ReasoningText { text } | Self::OutputText { text, .. } => text,
        }
    }
}

impl Usage {
    /// `reasoning_tokens`: how many of the completion's tokens were thoughts.
    pub(super) fn of(usage: v1::Usage, reasoning_tokens: u32) -> Self {
        Self {
            input_tokens: usage.prompt_tokens,
            input_tokens_details: InputDetails {
                cached_tokens: usage.cached_tokens,
            },
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputDetails { reasoning_tokens },
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
        }
    }
}

impl Failure {
    /// With the nearest of the codes that OpenAI's clients know.
    pub(super) fn of(error: &RpcError) -> Self {
        Self {
            code: match error.kind {
                ErrorKind::QueueFull => "rate_limit_exceeded",
                ErrorKind::InvalidArgument | ErrorKind::ContextLengthExceeded => "invalid_prompt",
                _ => "server_error",
            },
            message: error.message.clone(),
        }
    }
}

pub(super) fn unix_seconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs() as i64)
}

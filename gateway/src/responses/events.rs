//! The events of a response, numbered in their order.

use axum::body::Bytes;
use phalanx_proto::v1::TokenLogprobs;
use serde::{Serialize, Serializer};

use super::reply::{Item, Logprobs, Part, Reply};
use crate::openai::{logprobs::ChatTokens, sse};

/// Who is told of a response as it is made.
pub(super) trait Sink {
    fn event(&mut self, name: &'static str, body: Body<'_>);
}

/// Nobody.
impl Sink for () {
    fn event(&mut self, _: &'static str, _: Body<'_>) {}
}

/// What events say beside their name and number.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Body<'a> {
    Reply {
        response: &'a Reply,
    },
    Item {
        output_index: usize,
        item: &'a Item,
    },
    Part {
        #[serde(flatten)]
        at: At<'a>,
        part: &'a Part,
    },
    Delta {
        #[serde(flatten)]
        at: At<'a>,
        delta: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        logprobs: Option<Tokens<'a>>,
    },
    Text {
        #[serde(flatten)]
        at: At<'a>,
        text: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        logprobs: Option<Tokens<'a>>,
    },
    Arguments {
        #[serde(flatten)]
        at: At<'a>,
        name: &'a str,
        arguments: &'a str,
    },
}

/// Which item, and which part of it.
#[derive(Clone, Copy, Serialize)]
pub(super) struct At<'a> {
    item_id: &'a str,
    output_index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_index: Option<usize>,
}

impl<'a> At<'a> {
    pub(super) fn item(output_index: usize, item_id: &'a str) -> Self {
        Self {
            item_id,
            output_index,
            content_index: None,
        }
    }

    /// The item's only part.
    pub(super) fn part(output_index: usize, item_id: &'a str) -> Self {
        Self {
            content_index: Some(0),
            ..Self::item(output_index, item_id)
        }
    }
}

/// Log-probabilities, and whether they name tokens by their ids.
pub(super) struct Tokens<'a>(pub(super) &'a [TokenLogprobs], pub(super) bool);

impl<'a> Tokens<'a> {
    pub(super) fn of(logprobs: &'a Logprobs) -> Self {
        Self(&logprobs.tokens, logprobs.as_ids)
    }
}

impl Serialize for Tokens<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        ChatTokens::of(self.0, self.1).serialize(serializer)
    }
}

#[derive(Serialize)]
struct Event<'a> {
    r#type: &'static str,
    sequence_number: u64,
    #[serde(flatten)]
    body: Body<'a>,
}

/// Appends events as they are sent.
pub(super) struct Wire<'a> {
    pub(super) out: &'a mut Vec<u8>,
    /// Number of the next event.
    pub(super) next: &'a mut u64,
}

impl Sink for Wire<'_> {
    fn event(&mut self, name: &'static str, body: Body<'_>) {
        let event = Event {
            r#type: name,
            sequence_number: *self.next,
            body,
        };
        sse::named_event(self.out, name, &event);
        *self.next += 1;
    }
}

/// Keeps events, each by itself, so that one may begin at any of them.
#[derive(Default)]
pub(super) struct Log {
    next: u64,
    events: Vec<Bytes>,
}

impl Log {
    /// Those since the last call.
    pub(super) fn take(&mut self) -> Vec<Bytes> {
        std::mem::take(&mut self.events)
    }
}

impl Sink for Log {
    fn event(&mut self, name: &'static str, body: Body<'_>) {
        let mut out = Vec::new();
        let next = &mut self.next;
        Wire { out: &mut out, next }.event(name, body);
        self.events.push(out.into());
    }
}

/// Told only if somebody wants to know.
impl<S: Sink> Sink for Option<S> {
    fn event(&mut self, name: &'static str, body: Body<'_>) {
        if let Some(sink) = self {
            sink.event(name, body);
        }
    }
}

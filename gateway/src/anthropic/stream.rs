//! Anthropic's stream: named events, one block of text within one message.

use phalanx_proto::{
    RpcError,
    v1::{self, Choice, FinishReason},
};
use serde::Serialize;

use super::{
    error::AnthropicError,
    reply::{Message, Stop, TextBlock, Usage},
};
use crate::openai::{
    reply::Head,
    sse::{self, Events},
};

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event<'a> {
    MessageStart {
        message: Message<'a>,
    },
    ContentBlockStart {
        index: u32,
        content_block: TextBlock<'a>,
    },
    ContentBlockDelta {
        index: u32,
        delta: TextDelta<'a>,
    },
    ContentBlockStop {
        index: u32,
    },
    MessageDelta {
        delta: Stop<'a>,
        usage: Usage,
    },
    MessageStop,
}

impl Event<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop => "message_stop",
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        named(out, self.name(), self);
    }
}

#[derive(Serialize)]
struct TextDelta<'a> {
    r#type: &'static str,
    text: &'a str,
}

/// The one block there is.
const INDEX: u32 = 0;

fn named<T: Serialize>(out: &mut Vec<u8>, name: &str, data: &T) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.push(b'\n');
    sse::event(out, data);
}

#[derive(Default)]
pub(super) struct MessageEvents {
    opened: bool,
}

impl MessageEvents {
    fn open(out: &mut Vec<u8>, head: &Head, usage: v1::Usage) {
        let begun = v1::Usage {
            completion_tokens: 0,
            ..usage
        };
        let message = Message::begun(head, begun);
        Event::MessageStart { message }.write(out);
        let content_block = TextBlock::of("");
        Event::ContentBlockStart {
            index: INDEX,
            content_block,
        }
        .write(out);
    }
}

impl Events for MessageEvents {
    fn piece(
        &mut self,
        out: &mut Vec<u8>,
        head: &Head,
        choice: &Choice,
        usage: Option<v1::Usage>,
    ) -> Result<(), RpcError> {
        let usage = usage.unwrap_or_default();
        if !std::mem::replace(&mut self.opened, true) {
            Self::open(out, head, usage);
        }
        if !choice.text.is_empty() {
            let delta = TextDelta {
                r#type: "text_delta",
                text: &choice.text,
            };
            Event::ContentBlockDelta { index: INDEX, delta }.write(out);
        }
        if choice.finish_reason() == FinishReason::Unspecified {
            return Ok(());
        }
        let delta = Stop::of(choice)?;
        Event::ContentBlockStop { index: INDEX }.write(out);
        let usage = Usage::of(usage);
        Event::MessageDelta { delta, usage }.write(out);
        Event::MessageStop.write(out);
        Ok(())
    }

    /// The running usage came with the last piece.
    fn usage(&mut self, _: &mut Vec<u8>, _: &Head, _: v1::Usage) {}

    fn fail(&mut self, out: &mut Vec<u8>, error: RpcError) {
        named(out, "error", &AnthropicError::from(error).envelope());
    }

    /// `message_stop` was the end.
    fn end(&mut self, _: &mut Vec<u8>) {}
}

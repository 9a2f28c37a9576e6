//! Anthropic's stream: named events, one block after the other within one message.

use phalanx_proto::{
    RpcError,
    v1::{self, FinishReason},
};
use serde::Serialize;

use super::{
    error::AnthropicError,
    reply::{Block, Message, Stop, Usage},
};
use crate::openai::{
    reply::Head,
    sse::{self, Events, Piece},
};

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event<'a> {
    MessageStart { message: Message<'a> },
    ContentBlockStart { index: u32, content_block: Block<'a> },
    ContentBlockDelta { index: u32, delta: Delta<'a> },
    ContentBlockStop { index: u32 },
    MessageDelta { delta: Stop<'a>, usage: Usage },
    MessageStop,
}

#[derive(Serialize)]
#[serde(tag = "type")]
enum Delta<'a> {
    #[serde(rename = "thinking_delta")]
    Thinking { thinking: &'a str },
    #[serde(rename = "text_delta")]
    Text { text: &'a str },
    #[serde(rename = "input_json_delta")]
    InputJson { partial_json: &'a str },
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
        sse::named_event(out, self.name(), self);
    }
}

/// What the open block holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Thinking,
    Text,
    /// The call with this index.
    Call(u32),
}

#[derive(Default)]
pub(super) struct MessageEvents {
    begun: bool,
    open: Option<Kind>,
    /// Number of the open block, or of the next one.
    index: u32,
    /// Whether there were calls.
    calls: bool,
}

impl MessageEvents {
    fn begin(&mut self, out: &mut Vec<u8>, head: &Head, usage: v1::Usage) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let begun = v1::Usage {
            completion_tokens: 0,
            ..usage
        };
        let message = Message::begun(head, begun);
        Event::MessageStart { message }.write(out);
    }

    /// Makes the open block one of this kind.
    fn turn_to(&mut self, out: &mut Vec<u8>, kind: Kind, content_block: Block<'_>) {
        if self.open == Some(kind) {
            return;
        }
        self.close(out);
        self.open = Some(kind);
        let index = self.index;
        Event::ContentBlockStart { index, content_block }.write(out);
    }

    fn delta(&self, out: &mut Vec<u8>, delta: Delta<'_>) {
        let index = self.index;
        Event::ContentBlockDelta { index, delta }.write(out);
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        if self.open.take().is_some() {
            Event::ContentBlockStop { index: self.index }.write(out);
            self.index += 1;
        }
    }
}

impl Events for MessageEvents {
    fn piece(&mut self, out: &mut Vec<u8>, head: &Head, piece: Piece<'_>) -> Result<(), RpcError> {
        let choice = piece.choice;
        let usage = piece.usage.unwrap_or_default();
        self.begin(out, head, usage);
        if let Some(thinking) = choice.reasoning.as_deref().filter(|text| !text.is_empty()) {
            self.turn_to(out, Kind::Thinking, Block::thinking(""));
            self.delta(out, Delta::Thinking { thinking });
        }
        if !choice.text.is_empty() {
            self.turn_to(out, Kind::Text, Block::Text { text: "" });
            self.delta(out, Delta::Text { text: &choice.text });
        }
        for call in &choice.tool_calls {
            self.calls = true;
            self.turn_to(out, Kind::Call(call.index), Block::call(call, None));
            if !call.arguments.is_empty() {
                let partial_json = &call.arguments;
                self.delta(out, Delta::InputJson { partial_json });
            }
        }
        if choice.finish_reason() == FinishReason::Unspecified {
            return Ok(());
        }
        let delta = Stop::of(choice, self.calls)?;
        if self.open.is_none() && self.index == 0 {
            // Clients look at the first block.
            self.turn_to(out, Kind::Text, Block::Text { text: "" });
        }
        self.close(out);
        let usage = Usage::of(usage);
        Event::MessageDelta { delta, usage }.write(out);
        Event::MessageStop.write(out);
        Ok(())
    }

    /// The running usage came with the last piece.
    fn usage(&mut self, _: &mut Vec<u8>, _: &Head, _: v1::Usage) {}

    fn fail(&mut self, out: &mut Vec<u8>, error: RpcError) {
        sse::named_event(out, "error", &AnthropicError::from(error).envelope());
    }

    /// `message_stop` was the end.
    fn end(&mut self, _: &mut Vec<u8>) {}
}

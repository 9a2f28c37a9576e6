//! TGI's stream: one event for every token, the last with the whole text.

use phalanx_proto::{
    RpcError,
    v1::{self, Choice, FinishReason},
};
use serde::Serialize;

use super::{
    error::TgiError,
    params::Call,
    reply::{Token, chosen, finish_reason, top},
};
use crate::openai::{
    reply::Head,
    sse::{self, Events, Piece},
};

#[derive(Serialize)]
struct Event {
    index: usize,
    token: Token,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_tokens: Vec<Token>,
    generated_text: Option<String>,
    details: Option<Details>,
}

#[derive(Serialize)]
struct Details {
    finish_reason: &'static str,
    generated_tokens: usize,
    seed: Option<u64>,
    input_length: u32,
}

pub(super) struct TgiEvents {
    call: Call,
    text: String,
    /// Bytes of a character that no token has completed yet.
    partial: Vec<u8>,
    generated_tokens: usize,
    /// The end, held back until the number of prompt tokens is known: it comes with the usage.
    last: Option<(Event, &'static str)>,
}

impl TgiEvents {
    pub(super) fn new(call: Call) -> Self {
        Self {
            text: call.prefix.clone(),
            call,
            partial: Vec::new(),
            generated_tokens: 0,
            last: None,
        }
    }

    /// The text that a token completes, as TGI shows it: nothing while a character is incomplete.
    fn complete(&mut self, bytes: &[u8]) -> String {
        self.partial.extend_from_slice(bytes);
        let complete = match std::str::from_utf8(&self.partial) {
            Ok(_) => self.partial.len(),
            // Cut off within a character: the rest may come.
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            // No character at all.
            Err(_) => self.partial.len(),
        };
        let rest = self.partial.split_off(complete);
        let text = String::from_utf8_lossy(&self.partial).into_owned();
        self.partial = rest;
        text
    }

    /// One event for every token of a piece.
    fn events_of(&mut self, choice: &Choice) -> Vec<Event> {
        let mut events = Vec::new();
        for logprobs in &choice.logprobs {
            let Some(mut token) = chosen(logprobs) else {
                continue;
            };
            if let Some(chosen) = logprobs.chosen.as_ref().filter(|chosen| !chosen.special) {
                token.text = self.complete(&chosen.bytes);
            }
            self.generated_tokens += 1;
            let top_tokens = match self.call.top_n_tokens {
                Some(_) => top(logprobs),
                None => Vec::new(),
            };
            events.push(Event {
                index: self.generated_tokens,
                token,
                top_tokens,
                generated_text: None,
                details: None,
            });
        }
        events
    }

    /// The end may be known only after its token has been sent. It then comes as a special token without text, which
    /// clients leave out.
    fn end_alone(&self) -> Event {
        Event {
            index: self.generated_tokens,
            token: Token {
                id: 0,
                text: String::new(),
                logprob: 0.0,
                special: true,
            },
            top_tokens: Vec::new(),
            generated_text: None,
            details: None,
        }
    }
}

impl Events for TgiEvents {
    fn piece(&mut self, out: &mut Vec<u8>, _: &Head, piece: Piece<'_>) -> Result<(), RpcError> {
        let choice = piece.choice;
        self.text.push_str(&choice.text);
        let mut events = self.events_of(choice);
        if choice.finish_reason() != FinishReason::Unspecified {
            let reason = finish_reason(choice)?;
            let last = events.pop().unwrap_or_else(|| self.end_alone());
            self.last = Some((last, reason));
        }
        events.iter().for_each(|event| sse::event(out, event));
        Ok(())
    }

    fn usage(&mut self, out: &mut Vec<u8>, _: &Head, usage: v1::Usage) {
        let Some((mut last, finish_reason)) = self.last.take() else {
            return;
        };
        last.generated_text = Some(std::mem::take(&mut self.text));
        last.details = Some(Details {
            finish_reason,
            generated_tokens: self.generated_tokens,
            seed: self.call.seed,
            input_length: usage.prompt_tokens,
        });
        sse::event(out, &last);
    }

    fn fail(&mut self, out: &mut Vec<u8>, error: RpcError) {
        sse::event(out, &TgiError::from(error).into_body());
    }

    /// TGI's streams end without a word.
    fn end(&mut self, _: &mut Vec<u8>) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::caller::Caller;

    #[test]
    fn characters_come_whole() {
        let call = Call::parse(br#"{"inputs": "hi"}"#, Caller::default()).expect("valid");
        let mut events = TgiEvents::new(call);
        let (first, rest) = "é!".as_bytes().split_at(1);
        assert_eq!(events.complete(first), "");
        assert_eq!(events.complete(rest), "é!");
        assert_eq!(events.complete(&[0xFF, b'a']), "\u{FFFD}a");
        assert_eq!(events.complete(b"b"), "b");
    }
}

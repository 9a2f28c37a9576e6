//! A response in the making: what the coordinator sends becomes items, and the events that tell of them.

use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{self, Choice, FinishReason, GenerateChunk, TokenLogprobs, ToolCall},
};

use super::{
    events::{At, Body, Sink, Tokens},
    reply::{Failure, Incomplete, Item, Logprobs, Part, Reply, Status, Usage, unix_seconds},
};
use crate::openai::{error::broken_reply, reply::finish_reason};

/// What the open item is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Message,
    /// The call with this index.
    Call(u32),
}

#[derive(Debug)]
pub(super) struct Draft {
    pub(super) reply: Reply,
    /// Log-probabilities name tokens by their ids.
    as_ids: bool,
    begun: bool,
    /// Of the last item.
    open: Option<Kind>,
    /// Log-probabilities of tokens whose text has not come yet.
    unshown: Vec<TokenLogprobs>,
    /// Tokens so far, and those up to the last thought.
    tokens: u32,
    reasoning_tokens: u32,
    finish: FinishReason,
    usage: Option<Usage>,
}

impl Draft {
    pub(super) fn new(reply: Reply, as_ids: bool) -> Self {
        Self {
            reply,
            as_ids,
            begun: false,
            open: None,
            unshown: Vec::new(),
            tokens: 0,
            reasoning_tokens: 0,
            finish: FinishReason::Unspecified,
            usage: None,
        }
    }

    /// Says that the response has been begun, once.
    pub(super) fn begin<S: Sink>(&mut self, sink: &mut S, model: &str) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        self.reply.status = Status::InProgress;
        model.clone_into(&mut self.reply.model);
        let response = &self.reply;
        sink.event("response.created", Body::Reply { response });
        sink.event("response.in_progress", Body::Reply { response });
    }

    /// Takes the next chunk of a stream with one choice.
    ///
    /// # Errors
    /// Those of [`Draft::piece`].
    pub(super) fn chunk<S: Sink>(&mut self, sink: &mut S, chunk: &GenerateChunk) -> Result<(), RpcError> {
        self.begin(sink, &chunk.model);
        match &chunk.choice {
            Some(choice) => self.piece(sink, choice),
            None => {
                self.count(chunk.usage.unwrap_or_default());
                Ok(())
            }
        }
    }

    /// Takes the next piece of the choice.
    ///
    /// # Errors
    /// `Internal` for a choice that failed or goes on after its end, `Cancelled` for one that was aborted.
    pub(super) fn piece<S: Sink>(&mut self, sink: &mut S, piece: &Choice) -> Result<(), RpcError> {
        if piece.index > 0 || self.finish != FinishReason::Unspecified {
            return Err(broken_reply("a piece that belongs to no choice"));
        }
        // Contexts fit 32 bits.
        self.tokens = self.tokens.saturating_add(piece.token_ids.len() as u32);
        if let Some(thought) = piece.reasoning.as_deref().filter(|text| !text.is_empty()) {
            self.turn_to(sink, Kind::Reasoning, None);
            self.add_text(sink, thought);
            self.unshown.clear();
            self.reasoning_tokens = self.tokens;
        } else if piece.tool_calls.is_empty() {
            self.unshown.extend_from_slice(&piece.logprobs);
        }
        if !piece.text.is_empty() {
            self.turn_to(sink, Kind::Message, None);
            self.add_text(sink, &piece.text);
        }
        for call in &piece.tool_calls {
            self.turn_to(sink, Kind::Call(call.index), Some(call));
            self.add_arguments(sink, &call.arguments);
        }
        if finish_reason(piece)?.is_some() {
            self.finish = piece.finish_reason();
            self.close_all(sink)?;
        }
        Ok(())
    }

    /// Notes what the request used.
    pub(super) fn count(&mut self, usage: v1::Usage) {
        let reasoning_tokens = self.reasoning_tokens.min(usage.completion_tokens);
        self.usage = Some(Usage::of(usage, reasoning_tokens));
    }

    /// The stream has ended: says how the response did. Says nothing after [`Draft::fail`].
    ///
    /// # Errors
    /// `Internal` for a stream that ended before its choice did.
    pub(super) fn end<S: Sink>(&mut self, sink: &mut S) -> Result<(), RpcError> {
        if self.reply.status == Status::Failed {
            return Ok(());
        }
        let name = match self.finish {
            FinishReason::Unspecified => {
                return Err(broken_reply("the stream ended before its choice did"));
            }
            FinishReason::Length | FinishReason::Repetition => {
                let reason = match self.finish {
                    FinishReason::Repetition => "repetition",
                    _ => "max_output_tokens",
                };
                self.reply.incomplete_details = Some(Incomplete { reason });
                self.reply.status = Status::Incomplete;
                "response.incomplete"
            }
            _ => {
                self.reply.status = Status::Completed;
                self.reply.completed_at = Some(unix_seconds());
                "response.completed"
            }
        };
        self.reply.usage = self.usage;
        let response = &self.reply;
        sink.event(name, Body::Reply { response });
        Ok(())
    }

    /// Says that the response has failed.
    pub(super) fn fail<S: Sink>(&mut self, sink: &mut S, error: &RpcError) {
        self.reply.status = Status::Failed;
        self.reply.error = Some(Failure::of(error));
        if let Some(item) = self.open.take().and(self.reply.output.last_mut()) {
            *item.status_mut() = Status::Incomplete;
        }
        let response = &self.reply;
        sink.event("response.failed", Body::Reply { response });
    }

    /// Closes what is open at the end of the choice.
    fn close_all<S: Sink>(&mut self, sink: &mut S) -> Result<(), RpcError> {
        if self.finish == FinishReason::Abort {
            return Err(RpcError::new(ErrorKind::Cancelled, "the request was aborted"));
        }
        if self.reply.output.is_empty() {
            // Clients look at the first item.
            self.turn_to(sink, Kind::Message, None);
        }
        let status = match self.finish {
            FinishReason::Length | FinishReason::Repetition => Status::Incomplete,
            _ => Status::Completed,
        };
        self.close(sink, status);
        Ok(())
    }

    /// Makes the open item one of this kind; a call's first piece has its name.
    fn turn_to<S: Sink>(&mut self, sink: &mut S, kind: Kind, call: Option<&ToolCall>) {
        if self.open == Some(kind) {
            return;
        }
        self.close(sink, Status::Completed);
        self.open = Some(kind);
        let output_index = self.reply.output.len();
        let item = new_item(&self.reply.id, output_index, kind, call);
        sink.event(
            "response.output_item.added",
            Body::Item {
                output_index,
                item: &item,
            },
        );
        self.reply.output.push(item);
        let part = match kind {
            Kind::Call(_) => return self.unshown.clear(),
            Kind::Reasoning => Part::ReasoningText { text: String::new() },
            Kind::Message => Part::OutputText {
                text: String::new(),
                annotations: [],
                logprobs: Logprobs {
                    tokens: Vec::new(),
                    as_ids: self.as_ids,
                },
            },
        };
        if let Some(item) = self.reply.output.last_mut() {
            let at = At::part(output_index, item.id());
            sink.event("response.content_part.added", Body::Part { at, part: &part });
            item.content_mut()
                .into_iter()
                .for_each(|content| content.push(part.clone()));
        }
    }

    /// Adds to the text of the open item.
    fn add_text<S: Sink>(&mut self, sink: &mut S, delta: &str) {
        let Some((output_index, item)) = self.reply.output.iter_mut().enumerate().next_back() else {
            return;
        };
        let id = item.id().to_owned();
        let at = At::part(output_index, &id);
        let Some(part) = item.content_mut().and_then(|content| content.first_mut()) else {
            return;
        };
        part.text_mut().push_str(delta);
        let (name, logprobs) = match part {
            Part::ReasoningText { .. } => ("response.reasoning_text.delta", None),
            Part::OutputText { logprobs, .. } => {
                let known = logprobs.tokens.len();
                logprobs.tokens.append(&mut self.unshown);
                let tokens = Tokens(&logprobs.tokens[known..], self.as_ids);
                ("response.output_text.delta", Some(tokens))
            }
        };
        sink.event(name, Body::Delta { at, delta, logprobs });
    }

    /// Adds to the arguments of the open call.
    fn add_arguments<S: Sink>(&mut self, sink: &mut S, delta: &str) {
        let last = self.reply.output.iter_mut().enumerate().next_back();
        if let Some((output_index, Item::FunctionCall { id, arguments, .. })) = last
            && !delta.is_empty()
        {
            arguments.push_str(delta);
            let body = Body::Delta {
                at: At::item(output_index, id),
                delta,
                logprobs: None,
            };
            sink.event("response.function_call_arguments.delta", body);
        }
    }

    /// Says the whole of the open item.
    fn close<S: Sink>(&mut self, sink: &mut S, status: Status) {
        let Some(kind) = self.open.take() else { return };
        let Some((output_index, item)) = self.reply.output.iter_mut().enumerate().next_back() else {
            return;
        };
        *item.status_mut() = status;
        if let (Kind::Message, Some(Part::OutputText { logprobs, .. })) =
            (kind, item.content_mut().and_then(|content| content.first_mut()))
        {
            // Of the token that ended the text, which has none.
            logprobs.tokens.append(&mut self.unshown);
        }
        tell_whole(sink, output_index, item);
        sink.event("response.output_item.done", Body::Item { output_index, item });
    }
}

fn new_item(response: &str, output_index: usize, kind: Kind, call: Option<&ToolCall>) -> Item {
    let id = |prefix: &str| {
        let name = response.strip_prefix("resp_").unwrap_or(response);
        format!("{prefix}_{name}_{output_index}")
    };
    let status = Status::InProgress;
    match kind {
        Kind::Reasoning => Item::Reasoning {
            id: id("rs"),
            status,
            summary: [],
            content: Vec::new(),
        },
        Kind::Message => Item::Message {
            id: id("msg"),
            status,
            role: "assistant",
            content: Vec::new(),
        },
        Kind::Call(_) => Item::FunctionCall {
            id: id("fc"),
            status,
            call_id: call.map(|call| call.id.clone()).unwrap_or_default(),
            name: call.map(|call| call.name.clone()).unwrap_or_default(),
            arguments: String::new(),
        },
    }
}

/// The events that repeat an item's text or arguments as a whole.
fn tell_whole<S: Sink>(sink: &mut S, output_index: usize, item: &Item) {
    if let Item::FunctionCall {
        id, name, arguments, ..
    } = item
    {
        let at = At::item(output_index, id);
        let body = Body::Arguments { at, name, arguments };
        return sink.event("response.function_call_arguments.done", body);
    }
    let Some(part) = item.part() else { return };
    let at = At::part(output_index, item.id());
    let (name, logprobs) = match part {
        Part::ReasoningText { .. } => ("response.reasoning_text.done", None),
        Part::OutputText { logprobs, .. } => ("response.output_text.done", Some(Tokens::of(logprobs))),
    };
    let text = part.text();
    sink.event(name, Body::Text { at, text, logprobs });
    sink.event("response.content_part.done", Body::Part { at, part });
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::events::Log, *};
    use crate::responses::request::tests::reply;

    fn text(text: &str) -> Choice {
        Choice {
            text: text.to_owned(),
            token_ids: vec![1],
            ..Choice::default()
        }
    }

    fn thought(text: &str) -> Choice {
        Choice {
            reasoning: Some(text.to_owned()),
            token_ids: vec![1],
            ..Choice::default()
        }
    }

    fn call(index: u32, id: &str, arguments: &str) -> Choice {
        Choice {
            tool_calls: vec![ToolCall {
                index,
                id: id.to_owned(),
                name: id.to_owned(),
                arguments: arguments.to_owned(),
            }],
            token_ids: vec![1],
            ..Choice::default()
        }
    }

    fn last(mut piece: Choice, reason: FinishReason) -> Choice {
        piece.set_finish_reason(reason);
        piece
    }

    /// The response, and the events as they are sent.
    fn told(pieces: Vec<Choice>) -> (Value, Vec<Value>) {
        let (mut draft, mut log) = (Draft::new(reply(), false), Log::default());
        draft.begin(&mut log, "m");
        for piece in &pieces {
            draft.piece(&mut log, piece).expect("a good piece");
        }
        draft.count(v1::Usage {
            prompt_tokens: 5,
            completion_tokens: pieces.len() as u32,
            cached_tokens: 2,
        });
        draft.end(&mut log).expect("a good end");
        let events = log.take().into_iter().map(|event| {
            let event = String::from_utf8(event.to_vec()).expect("text");
            let (name, data) = event.trim_end().split_once('\n').expect("two lines");
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON");
            assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
            data
        });
        (
            serde_json::to_value(&draft.reply).expect("plain data"),
            events.collect(),
        )
    }

    fn names(events: &[Value]) -> Vec<&str> {
        let names = events.iter().map(|event| event["type"].as_str().expect("a type"));
        names
            .map(|name| name.strip_prefix("response.").expect("a prefix"))
            .collect()
    }

    #[test]
    fn thoughts_text_and_calls_are_items_in_turn() {
        let (reply, events) = told(vec![
            thought("Hm"),
            thought("."),
            text("So"),
            call(0, "a", "{"),
            call(0, "", "}"),
            last(call(1, "b", ""), FinishReason::ToolCalls),
        ]);
        assert_eq!(
            reply["output"],
            json!([
                {"type": "reasoning", "id": "rs_1_0", "status": "completed", "summary": [],
                    "content": [{"type": "reasoning_text", "text": "Hm."}]},
                {"type": "message", "id": "msg_1_1", "status": "completed", "role": "assistant",
                    "content": [{"type": "output_text", "text": "So", "annotations": [], "logprobs": []}]},
                {"type": "function_call", "id": "fc_1_2", "status": "completed", "call_id": "a", "name": "a",
                    "arguments": "{}"},
                {"type": "function_call", "id": "fc_1_3", "status": "completed", "call_id": "b", "name": "b",
                    "arguments": ""},
            ])
        );
        assert_eq!(
            reply["usage"],
            json!({"input_tokens": 5, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 6,
                "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 11})
        );
        assert_eq!(
            (&reply["status"], &reply["model"]),
            (&json!("completed"), &json!("m"))
        );
        let expected = "created in_progress \
            output_item.added content_part.added reasoning_text.delta reasoning_text.delta reasoning_text.done \
            content_part.done output_item.done \
            output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done \
            output_item.added function_call_arguments.delta function_call_arguments.delta \
            function_call_arguments.done output_item.done \
            output_item.added function_call_arguments.done output_item.done \
            completed";
        assert_eq!(names(&events).join(" "), expected);
        for (number, event) in events.iter().enumerate() {
            assert_eq!(event["sequence_number"], number);
        }
        assert_eq!(events[5]["delta"], ".");
        assert_eq!(
            (&events[5]["output_index"], &events[5]["content_index"]),
            (&json!(0), &json!(0))
        );
        assert_eq!(events[16]["item_id"], "fc_1_2");
        assert_eq!(events.last().expect("an end")["response"], reply);
    }

    #[test]
    fn an_answer_that_is_cut_off_is_incomplete() {
        for (finish, reason) in [
            (FinishReason::Length, "max_output_tokens"),
            (FinishReason::Repetition, "repetition"),
        ] {
            let (reply, events) = told(vec![last(text("So"), finish)]);
            assert_eq!(reply["status"], "incomplete");
            assert_eq!(reply["incomplete_details"], json!({"reason": reason}));
            assert_eq!(reply["output"][0]["status"], "incomplete");
            assert_eq!(names(&events).last(), Some(&"incomplete"));
        }
    }

    #[test]
    fn silence_is_an_empty_message() {
        let (reply, events) = told(vec![last(Choice::default(), FinishReason::Stop)]);
        assert_eq!(reply["output"][0]["content"][0]["text"], "");
        assert!(names(&events).contains(&"output_text.done"));
    }

    #[test]
    fn failures_are_told_once() {
        let (mut draft, mut log) = (Draft::new(reply(), false), Log::default());
        draft.begin(&mut log, "m");
        draft.piece(&mut log, &text("So")).expect("a good piece");
        let aborted = draft.piece(&mut log, &last(text(""), FinishReason::Abort));
        let error = aborted.expect_err("aborted");
        assert_eq!(error.kind, ErrorKind::Cancelled);
        draft.fail(&mut log, &error);
        draft.end(&mut log).expect("said already");
        let json = serde_json::to_value(&draft.reply).expect("plain data");
        assert_eq!(
            (&json["status"], &json["output"][0]["status"], &json["error"]),
            (
                &json!("failed"),
                &json!("incomplete"),
                &json!({"code": "server_error", "message": "the request was aborted"})
            )
        );
        let ends = log
            .take()
            .into_iter()
            .filter(|event| event.starts_with(b"event: response.failed"));
        assert_eq!(ends.count(), 1);
        let mut draft = Draft::new(reply(), false);
        draft.piece(&mut (), &text("So")).expect("a good piece");
        assert_eq!(
            draft.end(&mut ()).expect_err("not finished").kind,
            ErrorKind::Internal
        );
    }

    #[test]
    fn log_probabilities_are_of_the_text_alone() {
        let with = |mut piece: Choice, token: &str| {
            piece.logprobs = vec![TokenLogprobs {
                chosen: Some(v1::TokenLogprob {
                    token: token.to_owned(),
                    logprob: -0.5,
                    ..v1::TokenLogprob::default()
                }),
                ..TokenLogprobs::default()
            }];
            piece
        };
        let (reply, events) = told(vec![
            with(thought("Hm."), "Hm."),
            with(text(""), "S"),
            with(text("So"), "o"),
            with(last(text(""), FinishReason::Stop), "END"),
        ]);
        let tokens = |logprobs: &Value| -> Vec<String> {
            let tokens = logprobs.as_array().expect("a list").iter();
            tokens
                .map(|token| token["token"].as_str().expect("a token").to_owned())
                .collect()
        };
        assert_eq!(
            tokens(&reply["output"][1]["content"][0]["logprobs"]),
            ["S", "o", "END"]
        );
        let delta = events
            .iter()
            .find(|event| event["type"] == "response.output_text.delta");
        assert_eq!(tokens(&delta.expect("a delta")["logprobs"]), ["S", "o"]);
    }
}

//! What the replies of both routes have in common.

use phalanx_proto::{
    ErrorKind, RpcError,
    limits::REPETITION_DETECTED,
    v1::{self, Choice, FinishReason, GenerateResponse, PromptOutput, choice::StopReason},
};
use serde::Serialize;

use super::{error::broken_reply, prompt_reply::PromptReply, usage};

/// The first fields of a reply and of every event of a stream.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: i64,
    pub(crate) model: String,
}

/// A reply, or an event of a stream, with choices of type `C`.
#[derive(Serialize)]
pub(crate) struct Reply<'a, C> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    choices: &'a [C],
    /// `None`: left out. `Some(None)`: null, as OpenAI has it in all events but the last when usage was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<usage::Usage>>,
    #[serde(flatten)]
    prompt: PromptReply<'a>,
}

impl<'a, C: Serialize> Reply<'a, C> {
    pub(crate) fn new(head: &'a Head, object: &'static str, choices: &'a [C]) -> Self {
        Self {
            id: &head.id,
            object,
            created: head.created,
            model: &head.model,
            choices,
            usage: None,
            prompt: PromptReply::NONE,
        }
    }

    pub(crate) fn with_usage(mut self, usage: Option<Option<usage::Usage>>) -> Self {
        self.usage = usage;
        self
    }

    /// What is told of the prompt, where that is not told with each choice.
    pub(super) fn with_prompt(mut self, prompt: PromptReply<'a>) -> Self {
        self.prompt = prompt;
        self
    }
}

/// The string or the token id that ended a choice, or a word for what did (vLLM's extension).
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Stop<'a> {
    Text(&'a str),
    TokenId(u32),
}

pub(crate) fn stop_reason(choice: &Choice) -> Option<Stop<'_>> {
    if choice.finish_reason() == FinishReason::Repetition {
        return Some(Stop::Text(REPETITION_DETECTED));
    }
    choice.stop_reason.as_ref().map(|reason| match reason {
        StopReason::StopString(text) => Stop::Text(text),
        StopReason::StopTokenId(id) => Stop::TokenId(*id),
    })
}

/// `null` while a choice goes on.
///
/// # Errors
/// `Internal` for a choice that failed: it has no reply.
pub(crate) fn finish_reason(choice: &Choice) -> Result<Option<&'static str>, RpcError> {
    match choice.finish_reason() {
        FinishReason::Unspecified => Ok(None),
        FinishReason::Stop => Ok(Some("stop")),
        FinishReason::Length => Ok(Some("length")),
        FinishReason::Repetition => Ok(Some("repetition")),
        FinishReason::ToolCalls => Ok(Some("tool_calls")),
        FinishReason::Abort => Ok(Some("abort")),
        FinishReason::Error => Err(RpcError::new(ErrorKind::Internal, "the generation failed")),
    }
}

/// A request's choices over all its prompts, numbered through, and the sum of their usage.
pub(crate) struct Whole {
    pub(crate) head: Head,
    pub(crate) choices: Vec<Choice>,
    /// What is told of each prompt; every one has as many choices.
    pub(crate) prompts: Vec<PromptOutput>,
    pub(crate) usage: v1::Usage,
}

impl Whole {
    /// Joins the replies to each prompt, every one with `n` choices.
    ///
    /// # Errors
    /// `Internal` when a reply does not have exactly the choices 0 to n - 1, or one of them failed.
    pub(crate) fn join(id: String, n: u32, replies: Vec<GenerateResponse>) -> Result<Self, RpcError> {
        let first = replies.first().ok_or_else(|| broken_reply("there is none"))?;
        let head = Head {
            id,
            created: first.created,
            model: first.model.clone(),
        };
        let mut choices = Vec::new();
        let mut prompts = Vec::with_capacity(replies.len());
        let mut total = v1::Usage::default();
        for reply in replies {
            let offset = choices.len();
            choices.extend(reply.choices);
            choices[offset..].sort_by_key(|choice| choice.index);
            if !choices[offset..].iter().map(|choice| choice.index).eq(0..n) {
                return Err(broken_reply("it does not have the choices asked for"));
            }
            prompts.push(reply.prompt.unwrap_or_default());
            usage::add(&mut total, reply.usage.unwrap_or_default());
        }
        for (index, choice) in (0..).zip(&mut choices) {
            finish_reason(choice)?;
            choice.index = index;
        }
        Ok(Self {
            head,
            choices,
            prompts,
            usage: total,
        })
    }

    /// The choices with what is told of their prompts.
    pub(super) fn choices_and_prompts(&self) -> impl Iterator<Item = (&Choice, &PromptOutput)> {
        let n = self.choices.len() / self.prompts.len().max(1);
        let prompts = self
            .prompts
            .iter()
            .flat_map(move |prompt| std::iter::repeat_n(prompt, n));
        self.choices.iter().zip(prompts)
    }
}

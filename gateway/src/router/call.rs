//! A request that can be sent to one replica after another.

use phalanx_proto::{
    RpcError,
    secret::random_u64,
    v1::{
        ChatRequest, GenerateRequest, GenerateResponse, OutputOptions, ResumedChoice, SamplingParams,
        generate_request::Prompt,
    },
};

use super::affinity::Blocks;
use crate::backend::{Backend, Chunks};

#[derive(Clone)]
pub(super) enum Call {
    Generate(GenerateRequest),
    Chat(ChatRequest),
}

impl Call {
    /// Settles what would be drawn anew by every replica. The request's own seed and the servers' come first.
    pub(super) fn fix_seed(&mut self) {
        let sampling = match self {
            Self::Generate(request) => &mut request.sampling,
            Self::Chat(request) => &mut request.sampling,
        };
        sampling
            .get_or_insert_default()
            .fallback_seed
            .get_or_insert_with(random_u64);
    }

    fn sampling(&self) -> Option<&SamplingParams> {
        match self {
            Self::Generate(request) => request.sampling.as_ref(),
            Self::Chat(request) => request.sampling.as_ref(),
        }
    }

    fn output(&self) -> Option<&OutputOptions> {
        match self {
            Self::Generate(request) => request.output.as_ref(),
            Self::Chat(request) => request.output.as_ref(),
        }
    }

    pub(super) fn id(&self) -> &str {
        match self {
            Self::Generate(request) => &request.request_id,
            Self::Chat(request) => &request.request_id,
        }
    }

    /// Completions of the prompt.
    pub(super) fn n(&self) -> usize {
        self.sampling().and_then(|sampling| sampling.n).unwrap_or(1) as usize
    }

    /// Whether something follows the last choice's end.
    pub(super) fn ends_with_usage(&self) -> bool {
        self.output().is_some_and(|output| output.include_usage)
    }

    /// The same request, gone on with where its choices are.
    pub(super) fn resumed(&self, resume: Vec<ResumedChoice>) -> Self {
        let mut call = self.clone();
        match &mut call {
            Self::Generate(request) => request.resume = resume,
            Self::Chat(request) => request.resume = resume,
        }
        call
    }

    pub(super) async fn whole(self, backend: &Backend) -> Result<GenerateResponse, RpcError> {
        match self {
            Self::Generate(request) => backend.generate(request).await,
            Self::Chat(request) => backend.chat(request).await,
        }
    }

    pub(super) async fn stream(self, backend: &Backend) -> Result<Chunks, RpcError> {
        match self {
            Self::Generate(request) => backend.generate_stream(request).await,
            Self::Chat(request) => backend.chat_stream(request).await,
        }
    }

    /// Hashes of the prompt's beginnings. What makes the cache of a replica differ comes before the text.
    pub(super) fn blocks(&self) -> Vec<u64> {
        let mut blocks = Blocks::default();
        match self {
            Self::Generate(request) => {
                blocks.feed(request.cache_salt.as_deref().unwrap_or_default().as_bytes());
                match &request.prompt {
                    Some(Prompt::Text(text)) => blocks.feed(text.as_bytes()),
                    Some(Prompt::TokenIds(ids)) => {
                        for id in &ids.ids {
                            blocks.feed(&id.to_le_bytes());
                        }
                    }
                    None => {}
                }
            }
            Self::Chat(request) => {
                blocks.feed(request.cache_salt.as_deref().unwrap_or_default().as_bytes());
                blocks.feed(request.template_kwargs_json.as_bytes());
                blocks.feed(request.tools_json.as_bytes());
                for message in &request.messages {
                    // A byte that no text has, so that a role does not run into the text before it.
                    blocks.feed(&[0xff]);
                    blocks.feed(message.role.as_bytes());
                    blocks.feed(&[0xff]);
                    blocks.feed(message.content.as_bytes());
                    let calls = message.tool_calls.iter().map(|call| &call.arguments);
                    for text in message.text_parts.iter().chain(calls) {
                        blocks.feed(text.as_bytes());
                    }
                }
            }
        }
        blocks.finish()
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::v1::ChatMessage;

    use super::*;

    fn chat(contents: &[&str]) -> Call {
        let message = |content: &&str| ChatMessage {
            role: "user".to_owned(),
            content: (*content).to_owned(),
            ..ChatMessage::default()
        };
        Call::Chat(ChatRequest {
            messages: contents.iter().map(message).collect(),
            ..ChatRequest::default()
        })
    }

    #[test]
    fn a_conversation_begins_like_its_earlier_turns() {
        let (system, turn) = ("s".repeat(300), "t".repeat(200));
        let (one, two) = (chat(&[&system]).blocks(), chat(&[&system, &turn]).blocks());
        assert_eq!((one.len(), two.len()), (2, 4));
        assert_eq!(one[..2], two[..2]);
    }

    #[test]
    fn a_seed_is_drawn_once() {
        let seed = |call: &Call| call.sampling().expect("set").fallback_seed;
        let mut call = chat(&["a"]);
        call.fix_seed();
        let first = seed(&call);
        call.fix_seed();
        assert!(first.is_some() && seed(&call) == first);
    }
}

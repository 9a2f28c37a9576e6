//! Token counts.

use phalanx_proto::v1;
use serde::Serialize;

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: u32,
    total_tokens: u32,
    completion_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens_details: Option<PromptTokensDetails>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

impl Usage {
    /// `details`: whether the operator wants cached tokens reported.
    pub(crate) fn of(usage: v1::Usage, details: bool) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            completion_tokens: usage.completion_tokens,
            prompt_tokens_details: details.then_some(PromptTokensDetails {
                cached_tokens: usage.cached_tokens,
            }),
        }
    }
}

/// The sum over a request's prompts.
pub(crate) fn add(total: &mut v1::Usage, usage: v1::Usage) {
    total.prompt_tokens = total.prompt_tokens.saturating_add(usage.prompt_tokens);
    total.completion_tokens = total.completion_tokens.saturating_add(usage.completion_tokens);
    total.cached_tokens = total.cached_tokens.saturating_add(usage.cached_tokens);
}

//! What a reply must contain beside its text: the fields of a request, and the operator's word on them.

use phalanx_proto::{
    RpcError,
    limits::MAX_LOGPROB_TOKEN_IDS,
    v1::{OutputOptions, SamplingParams},
};
use serde::Deserialize;

use super::body::Bounded;

/// The operator's settings of replies (vLLM's flags of the same names).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplyOptions {
    /// `usage` reports how many prompt tokens came from the prefix cache.
    pub prompt_tokens_details: bool,
    /// Every stream ends with its usage.
    pub force_include_usage: bool,
    /// Log-probabilities name tokens as `token_id:7` whatever the request says.
    pub tokens_as_token_ids: bool,
}

/// vLLM's fields of both routes.
#[derive(Debug, Deserialize)]
pub(crate) struct OutputFields {
    prompt_logprobs: Option<i64>,
    logprob_token_ids: Option<Bounded<u32, MAX_LOGPROB_TOKEN_IDS>>,
    return_token_ids: Option<bool>,
    return_tokens_as_token_ids: Option<bool>,
    /// -1: to what leaves room for the completion.
    pub(super) truncate_prompt_tokens: Option<i32>,
}

impl OutputFields {
    /// Completes `output`, which has everything that OpenAI's fields say.
    ///
    /// # Errors
    /// `InvalidArgument` for log-probabilities of the prompt in a stream or in a number that is none; how many there may
    /// be is the coordinator's to judge.
    pub(super) fn complete(&self, output: &mut OutputOptions, streams: bool) -> Result<(), RpcError> {
        const PARAM: &str = "prompt_logprobs";
        let invalid = |message: String| Err(RpcError::invalid(PARAM, message));
        output.return_prompt_token_ids = self.return_token_ids.unwrap_or(false);
        let Some(count) = self.prompt_logprobs else {
            return Ok(());
        };
        if streams {
            return invalid("prompt_logprobs are not available when stream is true".to_owned());
        }
        match u32::try_from(count) {
            Ok(count) => output.prompt_logprobs = Some(count),
            Err(_) if count == -1 => {
                return invalid("prompt_logprobs of the whole vocabulary (-1) are not offered".to_owned());
            }
            Err(_) => {
                return invalid(format!(
                    "prompt_logprobs must be a 32-bit number from 0, not {count}"
                ));
            }
        }
        Ok(())
    }

    /// Takes the tokens out whose log-probabilities are reported in place of the best, which is the sampler's business.
    pub(super) fn list(&mut self, sampling: &mut SamplingParams) {
        sampling.logprob_token_ids = self.logprob_token_ids.take().unwrap_or_default().0;
    }

    /// How the reply to `output` is written.
    pub(super) fn style(&self, output: &OutputOptions, options: ReplyOptions) -> Style {
        Style {
            logprobs: output.logprobs.is_some(),
            prompt_logprobs: output.prompt_logprobs.is_some(),
            token_ids: output.return_prompt_token_ids,
            tokens_as_ids: self
                .return_tokens_as_token_ids
                .unwrap_or(options.tokens_as_token_ids),
            include_usage: output.include_usage,
            prompt_tokens_details: options.prompt_tokens_details,
        }
    }
}

/// How a reply is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Style {
    pub(super) logprobs: bool,
    pub(super) prompt_logprobs: bool,
    /// Token ids of prompt and completion.
    pub(super) token_ids: bool,
    /// Log-probabilities name tokens by their ids.
    pub(super) tokens_as_ids: bool,
    pub(super) include_usage: bool,
    pub(super) prompt_tokens_details: bool,
}

#[cfg(test)]
mod tests {
    use super::{super::body::parse, *};

    fn complete(body: &str, streams: bool) -> Result<OutputOptions, RpcError> {
        let mut output = OutputOptions::default();
        let fields: OutputFields = parse(body.as_bytes())?;
        fields.complete(&mut output, streams)?;
        Ok(output)
    }

    #[test]
    fn prompt_logprobs_are_a_number_and_not_for_streams() {
        let asked = |body, streams| complete(body, streams).map(|output| output.prompt_logprobs);
        assert_eq!(asked("{}", true), Ok(None));
        assert_eq!(asked(r#"{"prompt_logprobs": null}"#, true), Ok(None));
        assert_eq!(asked(r#"{"prompt_logprobs": 0}"#, false), Ok(Some(0)));
        for (body, streams) in [
            (r#"{"prompt_logprobs": 0}"#, true),
            (r#"{"prompt_logprobs": -1}"#, false),
            (r#"{"prompt_logprobs": -2}"#, false),
            (r#"{"prompt_logprobs": 5000000000}"#, false),
            (r#"{"prompt_logprobs": 1.5}"#, false),
        ] {
            let error = complete(body, streams).expect_err(body);
            assert_eq!(error.param.as_deref(), Some("prompt_logprobs"), "{body}");
        }
    }

    #[test]
    fn a_list_is_bounded_and_null_or_empty_asks_for_nothing() {
        let listed = |body: &str| -> Result<Vec<u32>, RpcError> {
            let mut fields: OutputFields = parse(body.as_bytes())?;
            let mut sampling = SamplingParams::default();
            fields.list(&mut sampling);
            Ok(sampling.logprob_token_ids)
        };
        assert_eq!(listed(r#"{"logprob_token_ids": [7, 5, 7]}"#), Ok(vec![7, 5, 7]));
        for nothing in [
            "{}",
            r#"{"logprob_token_ids": null}"#,
            r#"{"logprob_token_ids": []}"#,
        ] {
            assert_eq!(listed(nothing), Ok(vec![]), "{nothing}");
        }
        let many = format!(
            r#"{{"logprob_token_ids": [{}1]}}"#,
            "1,".repeat(MAX_LOGPROB_TOKEN_IDS)
        );
        for (body, param) in [
            (many.as_str(), "logprob_token_ids"),
            (r#"{"logprob_token_ids": 5}"#, "logprob_token_ids"),
            (r#"{"logprob_token_ids": [5, -1]}"#, "logprob_token_ids[1]"),
        ] {
            let error = listed(body).expect_err(body);
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
        }
    }

    #[test]
    fn the_request_overrides_the_operator() {
        let options = ReplyOptions {
            tokens_as_token_ids: true,
            ..ReplyOptions::default()
        };
        let style = |body: &str| {
            let fields: OutputFields = parse(body.as_bytes()).expect("valid");
            fields.style(&OutputOptions::default(), options)
        };
        assert!(style("{}").tokens_as_ids);
        assert!(!style(r#"{"return_tokens_as_token_ids": false}"#).tokens_as_ids);
    }
}

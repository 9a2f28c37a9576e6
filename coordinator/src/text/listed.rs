//! `logprob_token_ids`: tokens that are reported in place of the best.

use std::collections::BTreeSet;

use phalanx_proto::{RpcError, limits::MAX_LOGPROB_TOKEN_IDS, v1};

use super::{ModelLimits, token_ids};

const PARAM: &str = "logprob_token_ids";

/// The request's list, each token once, the first of equals. Errors: too many, one outside the vocabulary, no
/// log-probabilities to be part of, or no tokens to report them of.
pub(super) fn checked(
    params: &v1::SamplingParams,
    output: &v1::OutputOptions,
    limits: &ModelLimits,
) -> Result<Vec<u32>, RpcError> {
    let refused = |message: String| Err(RpcError::invalid(PARAM, message));
    let ids = &params.logprob_token_ids;
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    token_ids::check(PARAM, ids, MAX_LOGPROB_TOKEN_IDS, limits.vocab_size)?;
    if output.logprobs.is_none() {
        return refused(format!("{PARAM} needs logprobs."));
    }
    if params.max_tokens == Some(0) {
        return refused(format!(
            "{PARAM} is of the completion's tokens, and max_tokens is 0."
        ));
    }
    let mut seen = BTreeSet::new();
    Ok(ids.iter().copied().filter(|&id| seen.insert(id)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: ModelLimits = ModelLimits {
        max_model_len: 100,
        vocab_size: 50,
        max_logprobs: 20,
    };

    fn listed(ids: &[u32], logprobs: Option<u32>, max_tokens: u32) -> Result<Vec<u32>, RpcError> {
        let params = v1::SamplingParams {
            logprob_token_ids: ids.to_vec(),
            max_tokens: Some(max_tokens),
            ..Default::default()
        };
        let output = v1::OutputOptions {
            logprobs,
            ..Default::default()
        };
        checked(&params, &output, &LIMITS)
    }

    #[test]
    fn listed_tokens_stay_in_their_order_each_once() {
        assert_eq!(listed(&[7, 49, 7, 0], Some(0), 1), Ok(vec![7, 49, 0]));
        // More than --max-logprobs, which is not about them.
        let most: Vec<u32> = (0..128).map(|at| at % 50).collect();
        assert_eq!(listed(&most, Some(0), 1), Ok((0..50).collect()));
        assert_eq!(listed(&[], None, 0), Ok(vec![]));
    }

    #[test]
    fn refusals_name_the_limit() {
        for (refused, message) in [
            (
                listed(&[49, 50], Some(0), 1),
                "holds 50, but token ids are below 50.",
            ),
            (
                listed(&[1; 129], Some(0), 1),
                "has 129 ids, at most 128 are allowed.",
            ),
            (listed(&[1], None, 1), "needs logprobs."),
            (listed(&[1], Some(0), 0), "max_tokens is 0."),
        ] {
            let error = refused.expect_err(message);
            assert_eq!(error.param.as_deref(), Some(PARAM));
            assert!(error.message.ends_with(message), "{}", error.message);
        }
    }
}

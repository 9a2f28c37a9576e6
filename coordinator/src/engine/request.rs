//! Which requests an engine can run at all. Whatever passes here can be planned without ever leaving the step limits.

use phalanx_proto::limits::MAX_LOGPROB_TOKEN_IDS;

use super::{EngineConfig, EngineRequest, SamplingParams, StopRules};

/// Why a request can never run.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("{param} holds token {token}, the vocabulary has {vocab_size}")]
    UnknownToken {
        param: &'static str,
        token: u32,
        vocab_size: u32,
    },
    #[error("{param} is {value}, allowed is {allowed}")]
    OutOfRange {
        param: &'static str,
        value: f64,
        allowed: &'static str,
    },
    #[error("{param} needs {needed}")]
    Needs {
        param: &'static str,
        needed: &'static str,
    },
    #[error("{param} has {count}, limit {limit}")]
    TooMany {
        param: &'static str,
        count: usize,
        limit: usize,
    },
    #[error(
        "{prompt_tokens} prompt tokens and {max_tokens} to generate exceed the context of {max_model_len} tokens"
    )]
    ContextLengthExceeded {
        prompt_tokens: usize,
        max_tokens: u32,
        max_model_len: u32,
    },
    #[error(
        "{prompt_tokens} prompt tokens and {max_tokens} to generate need {needed_blocks} KV blocks, the cache has \
         {total_blocks}, which is room for {fitting_tokens} tokens"
    )]
    NeverFits {
        prompt_tokens: usize,
        max_tokens: u32,
        needed_blocks: u64,
        total_blocks: u32,
        /// Most tokens of prompt and completion together.
        fitting_tokens: u64,
    },
}

impl RequestError {
    /// The request's field that is to blame.
    pub fn param(&self) -> &'static str {
        match self {
            Self::EmptyPrompt => "prompt",
            Self::UnknownToken { param, .. }
            | Self::OutOfRange { param, .. }
            | Self::Needs { param, .. }
            | Self::TooMany { param, .. } => param,
            Self::ContextLengthExceeded { .. } | Self::NeverFits { .. } => "max_tokens",
        }
    }
}

impl EngineRequest {
    /// Whether an engine of this configuration could run the request, alone if need be.
    pub fn check(&self, config: &EngineConfig) -> Result<(), RequestError> {
        check_length(&self.prompt, &self.stop, config)?;
        check_tokens("prompt", self.prompt.iter().copied(), config)?;
        check_tokens("resume", self.output.iter().copied(), config)?;
        if self.stop.end_of(&self.output).is_some() {
            return Err(RequestError::OutOfRange {
                param: "resume",
                value: self.output.len() as f64,
                allowed: "output that goes on",
            });
        }
        check_tokens("stop_token_ids", self.stop.stop_token_ids.iter().copied(), config)?;
        check_sampling(&self.sampling, config)?;
        let bad_words = self.constraint.bad_words.iter().flatten();
        check_tokens("bad_words", bad_words.copied(), config)?;
        // Both end up in the same list of a row when min_tokens bans the stop tokens.
        check_count(
            "logit_bias and stop_token_ids together",
            self.sampling.logit_bias.len() + self.stop.stop_token_ids.len(),
            config.max_edits_per_row,
        )
    }
}

fn check_length(prompt: &[u32], stop: &StopRules, config: &EngineConfig) -> Result<(), RequestError> {
    if prompt.is_empty() {
        return Err(RequestError::EmptyPrompt);
    }
    if stop.max_tokens == 0 {
        return Err(RequestError::OutOfRange {
            param: "max_tokens",
            value: 0.0,
            allowed: "at least 1",
        });
    }
    let num_tokens = prompt.len() as u64 + u64::from(stop.max_tokens);
    if num_tokens > u64::from(config.max_model_len) {
        return Err(RequestError::ContextLengthExceeded {
            prompt_tokens: prompt.len(),
            max_tokens: stop.max_tokens,
            max_model_len: config.max_model_len,
        });
    }
    // The last token is sampled and never fed back, so its KV is never stored.
    let needed_blocks = (num_tokens - 1).div_ceil(u64::from(config.block_size));
    if needed_blocks > u64::from(config.num_blocks) {
        let room = u64::from(config.num_blocks) * u64::from(config.block_size) + 1;
        return Err(RequestError::NeverFits {
            prompt_tokens: prompt.len(),
            max_tokens: stop.max_tokens,
            needed_blocks,
            total_blocks: config.num_blocks,
            fitting_tokens: room.min(config.max_model_len.into()),
        });
    }
    Ok(())
}

fn check_tokens(
    param: &'static str,
    mut tokens: impl Iterator<Item = u32>,
    config: &EngineConfig,
) -> Result<(), RequestError> {
    let vocab_size = config.vocab_size;
    match tokens.find(|&token| token >= vocab_size) {
        None => Ok(()),
        Some(token) => Err(RequestError::UnknownToken {
            param,
            token,
            vocab_size,
        }),
    }
}

fn check_count(param: &'static str, count: usize, limit: u32) -> Result<(), RequestError> {
    let limit = limit as usize;
    if count <= limit {
        Ok(())
    } else {
        Err(RequestError::TooMany { param, count, limit })
    }
}

fn check_sampling(sampling: &SamplingParams, config: &EngineConfig) -> Result<(), RequestError> {
    let s = sampling;
    let range = |param, value: f32, allowed, fits: bool| {
        if fits && value.is_finite() {
            Ok(())
        } else {
            Err(RequestError::OutOfRange {
                param,
                value: f64::from(value),
                allowed,
            })
        }
    };
    range("temperature", s.temperature, "0 or more", s.temperature >= 0.0)?;
    range(
        "top_p",
        s.top_p,
        "above 0, at most 1",
        s.top_p > 0.0 && s.top_p <= 1.0,
    )?;
    range("min_p", s.min_p, "0 to 1", (0.0..=1.0).contains(&s.min_p))?;
    range(
        "repetition_penalty",
        s.repetition_penalty,
        "above 0",
        s.repetition_penalty >= f32::MIN_POSITIVE,
    )?;
    range("presence_penalty", s.presence_penalty, "a finite number", true)?;
    range("frequency_penalty", s.frequency_penalty, "a finite number", true)?;
    for &(_, bias) in &s.logit_bias {
        // Negative infinity bans a token; the other infinity and NaN would make every logit meaningless.
        if bias != f32::NEG_INFINITY {
            range("logit_bias", bias, "a finite number", true)?;
        }
    }
    check_tokens("logit_bias", s.logit_bias.iter().map(|&(id, _)| id), config)?;
    for (param, count) in [("logprobs", s.logprobs), ("prompt_logprobs", s.prompt_logprobs)] {
        check_count(param, count.unwrap_or(0) as usize, config.max_logprobs)?;
    }
    check_listed(s, config)
}

fn check_listed(sampling: &SamplingParams, config: &EngineConfig) -> Result<(), RequestError> {
    const PARAM: &str = "logprob_token_ids";
    let ids = &sampling.logprob_token_ids;
    check_count(PARAM, ids.len(), MAX_LOGPROB_TOKEN_IDS as u32)?;
    check_tokens(PARAM, ids.iter().copied(), config)?;
    if !ids.is_empty() && sampling.logprobs.is_none() {
        return Err(RequestError::Needs {
            param: PARAM,
            needed: "logprobs",
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use phalanx_proto::step::SequenceId;

    use super::*;
    use crate::engine::TenantId;

    fn request() -> EngineRequest {
        EngineRequest {
            id: SequenceId(1),
            prompt: vec![1, 2, 3],
            output: vec![],
            sampling: SamplingParams::GREEDY,
            stop: StopRules {
                max_tokens: 4,
                min_tokens: 0,
                stop_token_ids: vec![],
                repetition: None,
            },
            constraint: Box::default(),
            priority: 0,
            cache_salt: None,
            tenant: TenantId::default(),
        }
    }

    #[test]
    fn the_last_block_counts_to_the_token() {
        let mut config = EngineConfig::new(3, 64, 100);
        config.block_size = 2;
        // 3 + 4 tokens, of which 6 are stored: exactly 3 blocks of 2.
        assert_eq!(request().check(&config), Ok(()));
        let mut longer = request();
        longer.stop.max_tokens = 5;
        assert_eq!(
            longer.check(&config),
            Err(RequestError::NeverFits {
                prompt_tokens: 3,
                max_tokens: 5,
                needed_blocks: 4,
                total_blocks: 3,
                fitting_tokens: 7
            })
        );
        config.max_model_len = 6;
        assert!(matches!(
            request().check(&config),
            Err(RequestError::ContextLengthExceeded { .. })
        ));
    }

    #[test]
    fn whatever_the_codec_would_refuse_is_refused() {
        let config = EngineConfig::new(16, 64, 100);
        let refused = |change: &dyn Fn(&mut EngineRequest)| {
            let mut request = request();
            change(&mut request);
            request.check(&config).expect_err("must be refused").param()
        };
        assert_eq!(refused(&|r| r.prompt.clear()), "prompt");
        assert_eq!(refused(&|r| r.prompt[1] = 100), "prompt");
        assert_eq!(refused(&|r| r.output = vec![100]), "resume");
        assert_eq!(refused(&|r| r.output = vec![1; 4]), "resume");
        assert_eq!(refused(&|r| r.stop.max_tokens = 0), "max_tokens");
        assert_eq!(refused(&|r| r.stop.stop_token_ids = vec![100]), "stop_token_ids");
        assert_eq!(
            refused(&|r| r.constraint.bad_words = vec![vec![1, 100]]),
            "bad_words"
        );
        assert_eq!(refused(&|r| r.sampling.temperature = -1.0), "temperature");
        assert_eq!(refused(&|r| r.sampling.temperature = f32::NAN), "temperature");
        assert_eq!(refused(&|r| r.sampling.top_p = 0.0), "top_p");
        assert_eq!(refused(&|r| r.sampling.min_p = 1.5), "min_p");
        assert_eq!(
            refused(&|r| r.sampling.repetition_penalty = 0.0),
            "repetition_penalty"
        );
        assert_eq!(
            refused(&|r| r.sampling.presence_penalty = f32::INFINITY),
            "presence_penalty"
        );
        assert_eq!(refused(&|r| r.sampling.logprobs = Some(21)), "logprobs");
        let listed = |logprobs: Option<u32>, ids: Vec<u32>| {
            refused(&|r| {
                r.sampling.logprobs = logprobs;
                r.sampling.logprob_token_ids = ids.clone();
            })
        };
        assert_eq!(listed(None, vec![1]), "logprob_token_ids");
        assert_eq!(listed(Some(0), vec![1, 100]), "logprob_token_ids");
        assert_eq!(listed(Some(0), vec![1; 129]), "logprob_token_ids");
        assert_eq!(
            refused(&|r| r.sampling.prompt_logprobs = Some(21)),
            "prompt_logprobs"
        );
        assert_eq!(
            refused(&|r| r.sampling.logit_bias = vec![(1, f32::INFINITY)]),
            "logit_bias"
        );
        assert_eq!(
            refused(&|r| r.sampling.logit_bias = vec![(100, 1.0)]),
            "logit_bias"
        );
        assert_eq!(
            refused(&|r| r.sampling.logit_bias = vec![(1, 1.0); 1025]),
            "logit_bias and stop_token_ids together"
        );
    }
}

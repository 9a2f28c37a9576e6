//! `--speculative-config`, vLLM's JSON object.

use phalanx_coordinator::engine::NgramSpeculation;
use serde::Deserialize;

/// What vLLM knows of n-gram lookup. Fields of other methods are refused by name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SpeculativeConfig {
    method: Option<String>,
    /// As vLLM, `[ngram]` in place of a draft model is the method, too.
    model: Option<String>,
    num_speculative_tokens: u32,
    prompt_lookup_min: Option<u32>,
    prompt_lookup_max: Option<u32>,
}

/// vLLM's default of both bounds, when neither is given.
const DEFAULT_LOOKUP: u32 = 5;

pub(crate) fn parse(text: &str) -> Result<NgramSpeculation, String> {
    let config: SpeculativeConfig = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let model = config.model.as_deref();
    let method = config
        .method
        .as_deref()
        .or(model.filter(|&model| model == "ngram" || model == "[ngram]"));
    match method {
        Some("ngram" | "[ngram]") => {}
        Some(method) => return Err(format!("method is {method:?}, only \"ngram\" is offered")),
        None => return Err("method is missing, only \"ngram\" is offered".to_owned()),
    }
    // One bound alone is both, as in vLLM.
    let (min, max) = (config.prompt_lookup_min, config.prompt_lookup_max);
    let speculation = NgramSpeculation {
        num_speculative_tokens: config.num_speculative_tokens,
        prompt_lookup_min: min.or(max).unwrap_or(DEFAULT_LOOKUP),
        prompt_lookup_max: max.or(min).unwrap_or(DEFAULT_LOOKUP),
    };
    speculation.validate().map_err(|error| error.to_string())?;
    Ok(speculation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vllms_object_is_understood() {
        let parsed = |text: &str| {
            let speculation = parse(text).expect(text);
            let NgramSpeculation {
                num_speculative_tokens,
                prompt_lookup_min,
                prompt_lookup_max,
            } = speculation;
            (num_speculative_tokens, prompt_lookup_min, prompt_lookup_max)
        };
        let whole = r#"{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}"#;
        assert_eq!(parsed(whole), (4, 2, 4));
        assert_eq!(
            parsed(r#"{"model": "[ngram]", "num_speculative_tokens": 3}"#),
            (3, 5, 5)
        );
        let one = r#"{"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_max": 3}"#;
        assert_eq!(parsed(one), (1, 3, 3));
    }

    #[test]
    fn what_is_not_offered_is_named() {
        for (text, words) in [
            (r#"{"method": "eagle", "num_speculative_tokens": 2}"#, "eagle"),
            (r#"{"num_speculative_tokens": 2}"#, "method is missing"),
            (r#"{"method": "ngram"}"#, "num_speculative_tokens"),
            (
                r#"{"method": "ngram", "num_speculative_tokens": 2, "draft_tensor_parallel_size": 1}"#,
                "draft_tensor_parallel_size",
            ),
            (
                r#"{"method": "ngram", "num_speculative_tokens": 99}"#,
                "allowed are 1 to 16",
            ),
            ("ngram", "expected"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(words), "{error}");
        }
    }
}

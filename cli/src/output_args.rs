//! Flags of what comes out of a request: reports of tokens and usage, and what requests leave unset.

use std::path::PathBuf;

use clap::{Args, ValueEnum, builder::BoolishValueParser};
use phalanx_coordinator::text::{GenerationConfig, GenerationOptions};
use phalanx_gateway::ReplyOptions;
use serde_json::{Map, Value};

/// What HTTP replies contain.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ReplyArgs {
    /// Report in `usage` how many prompt tokens came from the prefix cache.
    #[arg(long, env = "PHALANX_ENABLE_PROMPT_TOKENS_DETAILS", value_parser = BoolishValueParser::new())]
    enable_prompt_tokens_details: bool,
    /// End every stream with its usage, whether the request asks for it or not.
    #[arg(long, env = "PHALANX_ENABLE_FORCE_INCLUDE_USAGE", value_parser = BoolishValueParser::new())]
    enable_force_include_usage: bool,
    /// Name tokens in log-probabilities as `token_id:7`, unless a request says otherwise.
    #[arg(long, env = "PHALANX_RETURN_TOKENS_AS_TOKEN_IDS", value_parser = BoolishValueParser::new())]
    return_tokens_as_token_ids: bool,
}

impl ReplyArgs {
    pub(crate) fn options(self) -> ReplyOptions {
        ReplyOptions {
            prompt_tokens_details: self.enable_prompt_tokens_details,
            force_include_usage: self.enable_force_include_usage,
            tokens_as_token_ids: self.return_tokens_as_token_ids,
        }
    }

    /// The same flags for a gateway in a process of its own.
    pub(crate) fn arguments(self) -> impl Iterator<Item = String> {
        let flags = [
            (
                self.enable_prompt_tokens_details,
                "--enable-prompt-tokens-details",
            ),
            (self.enable_force_include_usage, "--enable-force-include-usage"),
            (self.return_tokens_as_token_ids, "--return-tokens-as-token-ids"),
        ];
        flags
            .into_iter()
            .filter(|(given, _)| *given)
            .map(|(_, flag)| flag.to_owned())
    }
}

/// What requests leave unset, and what log-probabilities are of.
#[derive(Clone, Debug, Args)]
pub(crate) struct GenerationArgs {
    /// Where the defaults of sampling parameters come from: auto (the model), vllm (none), or a generation_config.json
    /// or a directory with one.
    #[arg(long, env = "PHALANX_GENERATION_CONFIG", default_value = "auto")]
    generation_config: PathBuf,
    /// JSON object of fields that replace those of the generation config, e.g. `{"temperature": 0.5}`.
    #[arg(long, env = "PHALANX_OVERRIDE_GENERATION_CONFIG", default_value = "{}", value_parser = parse_object)]
    override_generation_config: Map<String, Value>,
    /// What log-probabilities are of. Others of vLLM's modes are not offered.
    #[arg(long, env = "PHALANX_LOGPROBS_MODE", default_value = "raw_logprobs")]
    logprobs_mode: LogprobsMode,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogprobsMode {
    /// Log-softmax of the model's logits, before penalties, bias and temperature.
    #[value(name = "raw_logprobs")]
    RawLogprobs,
}

impl GenerationArgs {
    pub(crate) fn options(&self) -> GenerationOptions {
        // The only one there is; parsing has refused the others.
        let LogprobsMode::RawLogprobs = self.logprobs_mode;
        GenerationOptions {
            source: match self.generation_config.to_str() {
                Some("auto") => GenerationConfig::Auto,
                Some("vllm") => GenerationConfig::Vllm,
                _ => GenerationConfig::Path(self.generation_config.clone()),
            },
            overrides: self.override_generation_config.clone(),
        }
    }
}

fn parse_object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Both {
        #[command(flatten)]
        reply: ReplyArgs,
        #[command(flatten)]
        generation: GenerationArgs,
    }

    fn parse(flags: &[&str]) -> Result<Both, String> {
        let arguments = ["phalanx"].iter().chain(flags);
        Both::try_parse_from(arguments).map_err(|error| error.to_string())
    }

    #[test]
    fn a_gateway_of_its_own_gets_the_same_replies() {
        for flags in [
            &[][..],
            &["--enable-force-include-usage"],
            &["--enable-prompt-tokens-details", "--return-tokens-as-token-ids"],
        ] {
            let reply = parse(flags).expect("valid").reply;
            assert!(reply.arguments().eq(flags.iter().map(|flag| (*flag).to_owned())));
            let passed: Vec<String> = reply.arguments().collect();
            let passed: Vec<&str> = passed.iter().map(String::as_str).collect();
            assert_eq!(parse(&passed).expect("valid").reply.options(), reply.options());
        }
    }

    #[test]
    fn generation_defaults_have_three_sources_and_overrides() {
        let options = |flags: &[&str]| parse(flags).expect("valid").generation.options();
        assert_eq!(options(&[]), GenerationOptions::default());
        assert_eq!(
            options(&["--generation-config", "vllm"]).source,
            GenerationConfig::Vllm
        );
        let path = options(&["--generation-config", "/models/a"]).source;
        assert_eq!(path, GenerationConfig::Path("/models/a".into()));
        let overrides = options(&["--override-generation-config", r#"{"top_k": 3}"#]).overrides;
        assert_eq!(overrides["top_k"], 3);
    }

    #[test]
    fn what_is_not_offered_is_refused_by_name() {
        for (flags, part) in [
            (["--logprobs-mode", "processed_logits"], "raw_logprobs"),
            (["--override-generation-config", "[1]"], "not a JSON object"),
        ] {
            let error = parse(&flags).map(drop).expect_err("refused");
            assert!(error.contains(flags[0]) && error.contains(part), "{error}");
        }
    }
}

//! The flags of conversations: templates, tools, reasoning.

use std::path::PathBuf;

use anyhow::ensure;
use clap::{Args, builder::BoolishValueParser};
use phalanx_coordinator::text::{ChatOptions, ContentFormat, ReasoningParser, ToolParser};

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// Chat template file that replaces the model's.
    #[arg(long, env = "PHALANX_CHAT_TEMPLATE")]
    pub(crate) chat_template: Option<PathBuf>,
    /// How templates are given a message's content: auto (as the template looks at it), string, openai (a list of parts).
    #[arg(long, env = "PHALANX_CHAT_TEMPLATE_CONTENT_FORMAT", default_value = "auto")]
    chat_template_content_format: ContentFormat,
    /// Template variables of requests that do not set them, a JSON object.
    #[arg(long, env = "PHALANX_DEFAULT_CHAT_TEMPLATE_KWARGS", default_value = "")]
    default_chat_template_kwargs: String,
    /// Render with the template that a request brings along, if it does.
    #[arg(long, env = "PHALANX_TRUST_REQUEST_CHAT_TEMPLATE", value_parser = BoolishValueParser::new())]
    trust_request_chat_template: bool,
    /// Let the model decide whether to call tools; needs --tool-call-parser.
    #[arg(long, env = "PHALANX_ENABLE_AUTO_TOOL_CHOICE", value_parser = BoolishValueParser::new())]
    enable_auto_tool_choice: bool,
    /// How the model writes calls: hermes, llama3_json, pythonic, mistral, qwen3 (also qwen3_coder, qwen3_xml).
    #[arg(long, env = "PHALANX_TOOL_CALL_PARSER")]
    tool_call_parser: Option<ToolParser>,
    /// Do not show tools to the template if tool_choice is none.
    #[arg(long, env = "PHALANX_EXCLUDE_TOOLS_WHEN_TOOL_CHOICE_NONE", value_parser = BoolishValueParser::new())]
    exclude_tools_when_tool_choice_none: bool,
    /// How the model marks its reasoning, which is told apart from its answer: deepseek_r1, qwen3.
    #[arg(long, env = "PHALANX_REASONING_PARSER")]
    reasoning_parser: Option<ReasoningParser>,
}

impl ChatArgs {
    /// Errors: a model may not decide to call tools if nobody knows how it would.
    pub(crate) fn resolve(&self) -> anyhow::Result<ChatOptions> {
        ensure!(
            self.tool_call_parser.is_some() || !self.enable_auto_tool_choice,
            "--enable-auto-tool-choice requires --tool-call-parser"
        );
        Ok(ChatOptions {
            content_format: self.chat_template_content_format,
            trust_request_template: self.trust_request_chat_template,
            tool_parser: self.tool_call_parser.filter(|_| self.enable_auto_tool_choice),
            reasoning_parser: self.reasoning_parser,
            exclude_tools_when_none: self.exclude_tools_when_tool_choice_none,
            default_template_kwargs: self.default_chat_template_kwargs.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        chat: ChatArgs,
    }

    fn resolve(flags: &[&str]) -> anyhow::Result<ChatOptions> {
        Only::try_parse_from([&["phalanx"], flags].concat())?
            .chat
            .resolve()
    }

    #[test]
    fn calls_need_both_flags() {
        let parser = |flags: &[&str]| resolve(flags).expect("valid").tool_parser;
        assert_eq!(parser(&[]), None);
        assert_eq!(parser(&["--tool-call-parser", "hermes"]), None);
        assert_eq!(
            parser(&["--enable-auto-tool-choice", "--tool-call-parser", "qwen3_coder"]),
            Some(ToolParser::Qwen3)
        );
        let error = resolve(&["--enable-auto-tool-choice"]).expect_err("no parser");
        assert!(error.to_string().contains("--tool-call-parser"));
    }

    #[test]
    fn unknown_parsers_are_refused_with_the_known() {
        for (flag, known) in [
            (
                "--tool-call-parser",
                "hermes, llama3_json, pythonic, mistral, qwen3",
            ),
            ("--reasoning-parser", "deepseek_r1, qwen3"),
            ("--chat-template-content-format", "auto, string, openai"),
        ] {
            let error = resolve(&[flag, "mine"]).expect_err("unknown").to_string();
            assert!(error.contains(known), "{error}");
        }
    }
}

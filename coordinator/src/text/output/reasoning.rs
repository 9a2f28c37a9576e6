//! Tells what a model thinks from what it says: `<think>...</think>`.

use std::{fmt, str::FromStr};

use super::tag::{Piece, TagScanner};

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";
const CALL: &str = "<tool_call>";
const FUNCTION: &str = "<function=";
const TAGS: &[&str] = &[OPEN, CLOSE, CALL, FUNCTION];

/// How a model marks its reasoning; the names are vLLM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasoningParser {
    /// Always thinks first.
    DeepSeekR1,
    /// Thinks first unless the request's `enable_thinking` is false, and may call a function without an end of its
    /// reasoning.
    Qwen3,
}

impl ReasoningParser {
    pub const NAMES: [&str; 2] = ["deepseek_r1", "qwen3"];

    /// Tokens that must reach the parser even if special tokens are not shown.
    pub(crate) const MARKERS: &[&str] = &[OPEN, CLOSE];
    /// What reasoning begins with, unless the prompt has begun it.
    pub(crate) const START: &str = OPEN;
    /// What every reasoning ends with.
    pub(crate) const END: &str = CLOSE;

    /// Whether a completion of `prompt` begins with reasoning. Templates that switch thinking off write an empty thought.
    pub(crate) fn begins_with_reasoning(self, prompt: &str, enable_thinking: bool) -> bool {
        let switched_off = self == Self::Qwen3 && !enable_thinking;
        !switched_off && !prompt.trim_end().ends_with(CLOSE)
    }
}

impl FromStr for ReasoningParser {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "deepseek_r1" => Ok(Self::DeepSeekR1),
            "qwen3" => Ok(Self::Qwen3),
            _ => Err(format!("there is {}", Self::NAMES.join(", "))),
        }
    }
}

impl fmt::Display for ReasoningParser {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::DeepSeekR1 => Self::NAMES[0],
            Self::Qwen3 => Self::NAMES[1],
        })
    }
}

/// Splits a text that begins with reasoning. A text without an end of reasoning is all reasoning: it was cut short.
#[derive(Debug)]
pub(super) struct ReasoningSplitter {
    parser: ReasoningParser,
    scanner: TagScanner,
    /// Nothing but white space came so far, so an opening tag only says what is known.
    is_blank: bool,
    ended: bool,
    /// The tag of a call, and the white space after it: reasoning about calls, unless a function follows.
    call: String,
}

impl ReasoningSplitter {
    pub(super) fn new(parser: ReasoningParser) -> Self {
        Self {
            parser,
            scanner: TagScanner::new(TAGS),
            is_blank: true,
            ended: false,
            call: String::new(),
        }
    }

    /// Appends to `reasoning` and `content` what `text` adds to them.
    pub(super) fn push(&mut self, text: &str, reasoning: &mut String, content: &mut String) {
        if self.ended {
            return content.push_str(text);
        }
        let mut scanner = std::mem::replace(&mut self.scanner, TagScanner::new(TAGS));
        scanner.push(text, |piece| self.take(piece, reasoning, content));
        if self.ended {
            content.push_str(&scanner.finish());
        }
        self.scanner = scanner;
    }

    pub(super) fn finish(&mut self, reasoning: &mut String) {
        reasoning.push_str(&self.call);
        reasoning.push_str(&self.scanner.finish());
    }

    fn take(&mut self, piece: Piece<'_>, reasoning: &mut String, content: &mut String) {
        if let (true, Piece::Text(text) | Piece::Tag(text)) = (self.ended, piece) {
            return content.push_str(text);
        }
        match piece {
            Piece::Tag(FUNCTION) if !self.call.is_empty() => {
                self.ended = true;
                content.push_str(&std::mem::take(&mut self.call));
                return content.push_str(FUNCTION);
            }
            Piece::Text(text) if !self.call.is_empty() && text.trim().is_empty() => {
                return self.call.push_str(text);
            }
            _ => {}
        }
        reasoning.push_str(&std::mem::take(&mut self.call));
        match piece {
            Piece::Tag(CLOSE) => self.ended = true,
            Piece::Tag(OPEN) if self.is_blank => self.is_blank = false,
            Piece::Tag(CALL) if self.parser == ReasoningParser::Qwen3 => self.call.push_str(CALL),
            Piece::Tag(text) | Piece::Text(text) => {
                self.is_blank &= text.trim().is_empty();
                reasoning.push_str(text);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(parser: ReasoningParser, text: &str) -> (String, String) {
        let mut splitter = ReasoningSplitter::new(parser);
        let (mut reasoning, mut content) = (String::new(), String::new());
        for char in text.chars() {
            splitter.push(char.encode_utf8(&mut [0; 4]), &mut reasoning, &mut content);
        }
        splitter.finish(&mut reasoning);
        (reasoning, content)
    }

    #[test]
    fn reasoning_ends_at_its_tag() {
        for (text, reasoning, content) in [
            ("<think>\nHm.\n</think>\n\nParis.", "\nHm.\n", "\n\nParis."),
            ("Hm.</think>Paris.", "Hm.", "Paris."),
            ("Hm", "Hm", ""),
            ("<think></think>1 </think> 2 <think>", "", "1 </think> 2 <think>"),
            ("a <think> b</thin", "a <think> b</thin", ""),
        ] {
            let expected = (reasoning.to_owned(), content.to_owned());
            assert_eq!(split(ReasoningParser::DeepSeekR1, text), expected, "{text}");
        }
    }

    #[test]
    fn a_function_ends_qwens_reasoning_and_talk_of_calls_does_not() {
        for (text, reasoning, content) in [
            ("Hm.<tool_call>\n<function=f>", "Hm.", "<tool_call>\n<function=f>"),
            (
                "A <tool_call> is <function=f></think>!",
                "A <tool_call> is <function=f>",
                "!",
            ),
            ("Hm.<tool_call>\n", "Hm.<tool_call>\n", ""),
        ] {
            let expected = (reasoning.to_owned(), content.to_owned());
            assert_eq!(split(ReasoningParser::Qwen3, text), expected, "{text}");
        }
        let (reasoning, _) = split(ReasoningParser::DeepSeekR1, "<tool_call><function=f>");
        assert_eq!(reasoning, "<tool_call><function=f>");
    }

    #[test]
    fn thinking_can_be_switched_off() {
        let qwen = ReasoningParser::Qwen3;
        assert!(qwen.begins_with_reasoning("<|im_start|>assistant\n", true));
        assert!(!qwen.begins_with_reasoning("<|im_start|>assistant\n", false));
        assert!(!qwen.begins_with_reasoning("<think>\n\n</think>\n\n", true));
        assert!(ReasoningParser::DeepSeekR1.begins_with_reasoning("<think>\n", false));
    }
}

//! Tells what a model thinks from what it says: `<think>...</think>`.

use std::{fmt, str::FromStr};

use super::tag::{Piece, TagScanner};

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// How a model marks its reasoning; the names are vLLM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasoningParser {
    /// Always thinks first.
    DeepSeekR1,
    /// Thinks first unless the request's `enable_thinking` is false.
    Qwen3,
}

impl ReasoningParser {
    pub const NAMES: [&str; 2] = ["deepseek_r1", "qwen3"];

    /// Tokens that must reach the parser even if special tokens are not shown.
    pub(super) const MARKERS: &[&str] = &[OPEN, CLOSE];

    /// Whether a completion of `prompt` begins with reasoning. Templates that switch thinking off write an empty thought.
    pub(super) fn begins_with_reasoning(self, prompt: &str, enable_thinking: bool) -> bool {
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
    scanner: TagScanner,
    /// Nothing but white space came so far, so an opening tag only says what is known.
    is_blank: bool,
    ended: bool,
}

impl ReasoningSplitter {
    pub(super) fn new() -> Self {
        Self {
            scanner: TagScanner::new(ReasoningParser::MARKERS),
            is_blank: true,
            ended: false,
        }
    }

    /// Appends to `reasoning` and `content` what `text` adds to them.
    pub(super) fn push(&mut self, text: &str, reasoning: &mut String, content: &mut String) {
        if self.ended {
            return content.push_str(text);
        }
        let (is_blank, ended) = (&mut self.is_blank, &mut self.ended);
        self.scanner.push(text, |piece| match piece {
            Piece::Tag(CLOSE) if !*ended => *ended = true,
            Piece::Tag(OPEN) if *is_blank => *is_blank = false,
            Piece::Tag(text) | Piece::Text(text) => {
                *is_blank &= text.trim().is_empty();
                if *ended { &mut *content } else { &mut *reasoning }.push_str(text);
            }
        });
        if self.ended {
            content.push_str(&self.scanner.finish());
        }
    }

    pub(super) fn finish(&mut self, reasoning: &mut String) {
        reasoning.push_str(&self.scanner.finish());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str) -> (String, String) {
        let mut splitter = ReasoningSplitter::new();
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
            assert_eq!(split(text), (reasoning.to_owned(), content.to_owned()), "{text}");
        }
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

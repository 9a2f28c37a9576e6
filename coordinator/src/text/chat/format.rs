//! Whether a template takes a message's content as a text or as a list of parts.

use std::str::FromStr;

/// How templates are given a message's content; the names are vLLM's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ContentFormat {
    /// As the template looks at it.
    #[default]
    Auto,
    /// A text; parts are joined by line breaks.
    String,
    /// A list of `{"type": "text", "text": ...}`.
    OpenAi,
}

impl FromStr for ContentFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(Self::Auto),
            "string" => Ok(Self::String),
            "openai" => Ok(Self::OpenAi),
            _ => Err("there is auto, string, openai".to_owned()),
        }
    }
}

impl ContentFormat {
    /// Whether the template in `source` gets parts.
    pub(super) fn wants_parts(self, source: &str) -> bool {
        match self {
            Self::Auto => iterates_content(source),
            Self::String => false,
            Self::OpenAi => true,
        }
    }
}

/// Whether a loop of the template goes over some `content`.
fn iterates_content(source: &str) -> bool {
    source.split("{%").skip(1).any(|tag| {
        let tag = tag.trim_start_matches(['-', '+']).trim_start();
        let Some((_, list)) = tag.strip_prefix("for ").and_then(|rest| rest.split_once(" in ")) else {
            return false;
        };
        let list = list.trim_start();
        let end = list.find(|char: char| char.is_whitespace() || "|%(".contains(char));
        let list = list[..end.unwrap_or(list.len())].trim_end_matches('-');
        list == "content"
            || [".content", "['content']", "[\"content\"]"]
                .iter()
                .any(|name| list.ends_with(name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_over_content_want_parts() {
        for (source, parts) in [
            ("{% for m in messages %}{{ m.content }}{% endfor %}", false),
            ("{%- for part in message['content'] -%}{% endfor %}", true),
            ("{% for part in m.content|list %}", true),
            ("{%for part in content-%}", true),
            ("{% for line in m.content.split('\n') %}", false),
        ] {
            assert_eq!(ContentFormat::Auto.wants_parts(source), parts, "{source}");
        }
        assert!(
            ContentFormat::OpenAi.wants_parts("")
                && !ContentFormat::String.wants_parts("{% for a in content %}")
        );
    }
}

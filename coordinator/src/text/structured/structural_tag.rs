//! vLLM's structural tags: free text with tags in it whose contents are structured, such as the calls of tools.
//!
//! Two notations say the same: `structures` with `triggers`, and `format` (XGrammar's, of which what needs a grammar within
//! the grammar is not offered). Free text is lexed lazily up to a trigger, as in llguidance's own `StructTag`.

use llguidance::regex_to_lark;
use serde::Deserialize;
use serde_json::Value;

use super::{
    json_schema::JsonOptions,
    lark::{self, Rules, TEXT},
    source::unanchored,
};
use crate::text::TokenTable;

/// Most tags, which become rules.
const MAX_TAGS: usize = 512;

type Result<T> = std::result::Result<T, String>;

#[derive(Deserialize)]
struct StructuralTag {
    format: Option<Format>,
    structures: Option<Vec<Structure>>,
    triggers: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct Structure {
    begin: String,
    schema: Value,
    end: String,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum Format {
    ConstString {
        value: String,
    },
    JsonSchema {
        json_schema: Value,
    },
    Regex {
        pattern: String,
    },
    AnyText {},
    Sequence {
        elements: Vec<Format>,
    },
    Or {
        elements: Vec<Format>,
    },
    Tag {
        begin: String,
        content: Box<Format>,
        end: String,
    },
    TriggeredTags {
        triggers: Vec<String>,
        tags: Vec<Format>,
        #[serde(default)]
        at_least_one: bool,
        #[serde(default)]
        stop_after_first: bool,
    },
    TagsWithSeparator {
        tags: Vec<Format>,
        separator: String,
        #[serde(default)]
        at_least_one: bool,
        #[serde(default)]
        stop_after_first: bool,
    },
}

/// A Lark grammar for the tag in `text`. Errors: not a structural tag, or what is not offered.
pub(super) fn to_lark(text: &str, options: JsonOptions<'_>, table: &TokenTable) -> Result<String> {
    let tag: StructuralTag =
        serde_json::from_str(text).map_err(|error| format!("is not a structural tag: {error}"))?;
    let format = match (tag.format, tag.structures, tag.triggers) {
        (Some(format), None, None) => format,
        (None, Some(structures), Some(triggers)) => of_structures(structures, triggers),
        _ => return Err("needs either format, or structures and triggers".into()),
    };
    let mut rules = Rules::with_options(table, options);
    let start = rules.expression(&format, true)?;
    Ok(rules.finish(&start))
}

fn of_structures(structures: Vec<Structure>, triggers: Vec<String>) -> Format {
    let tag = |structure: Structure| Format::Tag {
        begin: structure.begin,
        content: Box::new(Format::JsonSchema {
            json_schema: structure.schema,
        }),
        end: structure.end,
    };
    Format::TriggeredTags {
        triggers,
        tags: structures.into_iter().map(tag).collect(),
        at_least_one: false,
        stop_after_first: false,
    }
}

impl Rules<'_> {
    /// An expression for `format`. `last`: nothing follows, so the text may be free to the end.
    fn expression(&mut self, format: &Format, last: bool) -> Result<String> {
        match format {
            Format::ConstString { value } if value.is_empty() => Ok(lark::quoted("")),
            Format::ConstString { value } => Ok(self.literals(value)),
            Format::JsonSchema { json_schema } => self.json(json_schema.clone()),
            Format::Regex { pattern } if unanchored(pattern).is_empty() => Err("has an empty pattern".into()),
            Format::Regex { pattern } => {
                let pattern = regex_to_lark(unanchored(pattern), "");
                Ok(self.rule(&format!("/{pattern}/")))
            }
            Format::AnyText {} if last => Ok(TEXT.into()),
            Format::AnyText {} => Err("has any_text that is neither the content of a tag nor the end".into()),
            Format::Sequence { elements } => {
                let count = elements.len();
                let parts = elements.iter().enumerate();
                let parts: Result<Vec<_>> = parts
                    .map(|(at, element)| self.expression(element, last && at + 1 == count))
                    .collect();
                some(parts?).map(|parts| format!("({})", parts.join(" ")))
            }
            Format::Or { elements } => {
                let parts: Result<Vec<_>> = elements
                    .iter()
                    .map(|element| self.expression(element, last))
                    .collect();
                some(parts?).map(|parts| format!("({})", parts.join(" | ")))
            }
            Format::Tag { begin, content, end } => self.tag(begin, (content, end), last),
            Format::TriggeredTags {
                triggers,
                tags,
                at_least_one,
                stop_after_first,
            } => {
                let ends_with_one = *at_least_one && *stop_after_first;
                if !last && !ends_with_one {
                    return Err("has triggered_tags that are not the end".into());
                }
                self.triggered(triggers, tags, (*at_least_one, *stop_after_first))
            }
            Format::TagsWithSeparator {
                tags,
                separator,
                at_least_one,
                stop_after_first,
            } => {
                let tags = self.alternatives(tags)?;
                let separator = self.literals(separator);
                let list = if *stop_after_first {
                    tags
                } else {
                    format!("({tags} ({separator} {tags})*)")
                };
                Ok(if *at_least_one { list } else { format!("({list})?") })
            }
        }
    }

    /// Any one of the tags.
    fn alternatives(&mut self, tags: &[Format]) -> Result<String> {
        let tags: Result<Vec<_>> = tags.iter().map(|tag| self.whole_tag(tag)).collect();
        let tags = some(tags?)?;
        Ok(self.rule(&tags.join(" | ")))
    }

    fn whole_tag(&mut self, tag: &Format) -> Result<String> {
        match tag {
            Format::Tag { begin, content, end } => self.tag(begin, (content, end), false),
            _ => Err("has something else than tags where tags belong".into()),
        }
    }

    fn tag(&mut self, begin: &str, (content, end): (&Format, &str), last: bool) -> Result<String> {
        let rest = self.after_begin(content, end, last)?;
        let body = format!("{} {rest}", self.literals(begin));
        Ok(self.rule(&body))
    }

    /// A tag's content and end.
    fn after_begin(&mut self, content: &Format, end: &str, last: bool) -> Result<String> {
        if let Format::AnyText {} = content
            && !end.is_empty()
        {
            return self.text_up_to(TEXT, end);
        }
        let content = self.expression(content, last && end.is_empty())?;
        Ok(format!("{content} {}", self.literals(end)))
    }

    /// Free text in which a trigger begins one of its tags.
    fn triggered(
        &mut self,
        triggers: &[String],
        tags: &[Format],
        (at_least_one, stop_after_first): (bool, bool),
    ) -> Result<String> {
        if tags.len() > MAX_TAGS {
            return Err(format!("has {} tags, the limit is {MAX_TAGS}", tags.len()));
        }
        if triggers.iter().any(String::is_empty) {
            return Err("has an empty trigger".into());
        }
        let first = match at_least_one {
            true => Some(self.alternatives(tags)?),
            false => None,
        };
        if let (Some(first), true) = (&first, stop_after_first) {
            return Ok(first.clone());
        }
        let mut later = Vec::new();
        for tag in tags {
            let Format::Tag { begin, content, end } = tag else {
                return Err("has something else than tags where tags belong".into());
            };
            let Some(trigger) = triggers.iter().find(|trigger| begin.starts_with(*trigger)) else {
                let begin = lark::quoted(begin);
                return Err(format!("has a tag that begins with {begin}, as no trigger does"));
            };
            let before = self.text_up_to(TEXT, trigger)?;
            let rest = self.after_begin(content, end, false)?;
            let rest = format!("{before} {} {rest}", self.literals(&begin[trigger.len()..]));
            later.push(self.rule(&rest));
        }
        let later = some(later)?.join(" | ");
        if stop_after_first {
            return Ok(format!("({later} | {TEXT})"));
        }
        Ok(format!("{} ({later})* {TEXT}", first.unwrap_or_default()))
    }
}

fn some(parts: Vec<String>) -> Result<Vec<String>> {
    if parts.is_empty() {
        return Err("has an empty list of elements or tags".into());
    }
    Ok(parts)
}

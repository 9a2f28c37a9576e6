//! JSON calls that are the whole message, or all of it behind `<|python_tag|>`.

use phalanx_proto::RpcError;

use super::{super::llama::PYTHON_TAG, Calls, text_up_to};
use crate::text::structured::lark::{Rules, TEXT, quoted};

/// What the parser takes for the beginning of a call.
const BEGINS_CALL: &str = r"(?s:[\s\[\],;]*\{.*)";
/// A text with the tag in it; where the tag is a special token, none has it.
const IS_TAGGED: &str = r"(?s:.*<\|python_tag\|>.*)";
/// So many line ends and spaces before a call.
const GAP: &str = r"/[ \n]{0,8}/";

/// The grammar of a free text, or of calls.
pub(super) fn grammar(calls: &Calls<'_>, mut rules: Rules<'_>) -> Result<String, RpcError> {
    let free = rules.terminal(&format!("{TEXT} & ~/{BEGINS_CALL}/ & ~/{IS_TAGGED}/"));
    let mut forms = Vec::new();
    for callee in &calls.functions {
        // One terminal up to where free texts have ended: the lexer follows both, and takes the longest.
        let open = quoted(&format!("{{\"name\": {}, \"", callee.quoted_name()));
        let open = rules.terminal(&format!("{GAP} {open}"));
        let arguments = callee.json(&mut rules, &callee.schema())?;
        forms.push(format!(
            r#"{open} ("parameters" | "arguments") "\": " {arguments} "}}""#
        ));
    }
    let call = rules.rule(&forms.join(" | "));
    let list = if calls.parallel {
        rules.rule(&format!(r#"{call} (";" {call})*"#))
    } else {
        call
    };
    let tagged = text_up_to(&mut rules, &free, PYTHON_TAG)?;
    Ok(rules.finish(&format!("{free} | {list} | {tagged} {list}")))
}

//! A Python list of calls that is the whole message. The arguments of strict functions are JSON, of which the parser reads
//! all: Python's own constants stand for whole arguments, and within lists and dictionaries JSON's do.

use phalanx_proto::RpcError;

use super::{
    super::{
        python::is_argument_name,
        pythonic::{END, START, is_function_name},
    },
    Callee, Calls,
    arguments::{self, Argument, is_plain},
};
use crate::text::{
    json::object,
    structured::lark::{Rules, TEXT, quoted},
};

/// What the parser takes for the beginning of calls.
const BEGINS_CALLS: &str = r"(?s:(\s|<\|python_(start|end)\|>)*\[\s*[\w\p{N}][\w\p{N}.\-]*\(.*)";
/// So many line ends and spaces before the list.
const GAP: &str = r"/[ \n]{0,8}/";
const BOOLEAN: &str = r#"("True" | "False" | "true" | "false")"#;

/// The grammar of a free text, or of calls.
pub(super) fn grammar(calls: &Calls<'_>, mut rules: Rules<'_>) -> Result<String, RpcError> {
    let free = rules.terminal(&format!("{TEXT} & ~/{BEGINS_CALLS}/"));
    let mut free_callees = calls
        .functions
        .iter()
        .filter(|callee| !callee.function.is_strict());
    let any = free_callees
        .next()
        .map(|callee| any_arguments(&mut rules, callee));
    let any = any.transpose()?.unwrap_or_default();
    let (mut first, mut later) = (Vec::new(), Vec::new());
    for callee in &calls.functions {
        let (name, is_strict) = (callee.function.name(), callee.function.is_strict());
        if !is_function_name(name) {
            if is_strict {
                return Err(callee.invalid("name", "cannot stand in a Python call, so it cannot be strict"));
            }
            continue;
        }
        let arguments = if is_strict {
            strict_arguments(&mut rules, callee)?
        } else {
            any.clone()
        };
        let rest = rules.rule(&format!(r#"{arguments} ")""#));
        // One terminal up to where free texts have ended: the lexer follows both, and takes the longest.
        let open = rules.terminal(&format!("{GAP} {}", quoted(&format!("[{name}("))));
        first.push(format!("{open} {rest}"));
        later.push(format!("{} {rest}", quoted(&format!("{name}("))));
    }
    let (first, later) = (rules.rule(&first.join(" | ")), rules.rule(&later.join(" | ")));
    let more = if calls.parallel {
        format!(r#"(", " {later})*"#)
    } else {
        String::new()
    };
    let mark = |name: &str| rules.special(name).map(|token| format!("({token})?"));
    let (start, end) = (mark(START).unwrap_or_default(), mark(END).unwrap_or_default());
    Ok(rules.finish(&format!(r#"{start} ({free} | {first} {more} "]" {end})"#)))
}

/// A rule for all that a strict function may be given: required arguments, and others or not, in the schema's order.
fn strict_arguments(rules: &mut Rules<'_>, callee: &Callee<'_>) -> Result<String, RpcError> {
    let arguments = arguments::of(&callee.schema());
    let arguments = arguments.map_err(|why| callee.invalid("parameters", &why))?;
    // What may come from an argument on, if it is the first one that is given, and if others were given before.
    let (mut first, mut later) = (quoted(""), quoted(""));
    for argument in arguments.iter().rev() {
        let given = strict_argument(rules, callee, argument)?;
        if argument.is_required {
            first = rules.rule(&format!("{given} {later}"));
            later = rules.rule(&format!(r#"", " {given} {later}"#));
        } else {
            first = rules.rule(&format!("{given} {later} | {first}"));
            later = rules.rule(&format!(r#"(", " {given})? {later}"#));
        }
    }
    Ok(first)
}

fn strict_argument(
    rules: &mut Rules<'_>,
    callee: &Callee<'_>,
    argument: &Argument,
) -> Result<String, RpcError> {
    let name = &argument.name;
    if !is_argument_name(name) {
        let shown: String = name.chars().take(64).collect();
        let why = format!("has the property {shown:?}, which cannot name an argument in a Python call");
        return Err(callee.invalid("parameters", &why));
    }
    let value = match &argument.schema {
        schema if is_plain(schema, "boolean") => BOOLEAN.to_owned(),
        schema if is_plain(schema, "null") => r#"("None" | "null")"#.to_owned(),
        schema => callee.json(rules, schema)?,
    };
    Ok(rules.rule(&format!("{} {value}", quoted(&format!("{name}=")))))
}

/// A rule for arguments of any names and values.
fn any_arguments(rules: &mut Rules<'_>, callee: &Callee<'_>) -> Result<String, RpcError> {
    let json = callee.json(rules, &object([]))?;
    let text = r#"/'([^'\\\n]|\\['"\\nrt])*'/"#;
    let value = rules.rule(&format!(r#"{json} | "True" | "False" | "None" | {text}"#));
    let argument = rules.rule(&format!(r#"/[A-Za-z_][A-Za-z0-9_]{{0,63}}/ "=" {value}"#));
    Ok(rules.rule(&format!(r#"({argument} (", " {argument})*)?"#)))
}

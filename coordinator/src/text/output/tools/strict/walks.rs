//! Random texts of every grammar, drawn as a model draws them that knows nothing: whatever the mask allows is read back as
//! calls of known functions, with arguments as they must be.

use serde_json::{Map, Value, json};

use super::{
    ToolParser,
    tests::{EOS, Language, function, tools},
};
use crate::engine::GrammarStatus;

/// Longest walk; those that are not over by then say nothing.
const MAX_BYTES: usize = 600;
const WALKS: u64 = 60;

/// Knuth's linear congruential generator (MMIX), of which the upper half is used.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }
}

/// How likely a byte is drawn behind a text: what ends something is, so that texts end.
fn weight(token: u32, text: &[u8]) -> usize {
    let goes_on = |tag: &str| {
        let mut places = (1..tag.len()).filter(|&place| u32::from(tag.as_bytes()[place]) == token);
        places.any(|place| text.ends_with(&tag.as_bytes()[..place]))
    };
    match char::from_u32(token) {
        _ if token == EOS => 60,
        _ if goes_on("\n</parameter>\n") || goes_on("</function>") => 300,
        // A number that no machine holds is nobody's call.
        Some('e' | 'E') if text.last().is_some_and(u8::is_ascii_digit) => 0,
        Some('"' | '}' | ']' | ')') => 30,
        Some('<' | '\n') => 6,
        _ => 1,
    }
}

/// A text of the language that begins with `prefix`; none if it does not come to an end.
fn walk(language: &Language, prefix: &str, dice: &mut Dice) -> Option<String> {
    let mut grammar = language.begin();
    let mut text = Vec::new();
    for byte in prefix.bytes() {
        assert!(
            grammar.allowed().expect("simple").contains(byte.into()),
            "{prefix}"
        );
        grammar.accept(byte.into()).expect("it was allowed");
        text.push(byte);
    }
    while text.len() < MAX_BYTES {
        let allowed = grammar.allowed().expect("simple");
        let tokens = (0..=EOS).filter(|&token| allowed.contains(token));
        let tokens: Vec<(u32, usize)> = tokens.map(|token| (token, weight(token, &text))).collect();
        let mut left = dice.roll(tokens.iter().map(|(_, weight)| weight).sum::<usize>().max(1));
        let drawn = tokens.iter().find(|(_, weight)| match left.checked_sub(*weight) {
            Some(rest) => {
                left = rest;
                false
            }
            None => true,
        });
        let (token, _) = drawn?;
        if *token == EOS {
            return String::from_utf8(text).ok();
        }
        text.push(*token as u8);
        if grammar.accept(*token).expect("it was allowed") == GrammarStatus::Complete {
            return String::from_utf8(text).ok();
        }
    }
    None
}

fn follows(name: &str, arguments: &Map<String, Value>) -> bool {
    match name {
        "get" => {
            let known = ["city", "days", "unit", "exact", "place", "tags"];
            arguments.keys().all(|key| known.contains(&key.as_str()))
                && arguments.get("city").is_some_and(Value::is_string)
                && arguments
                    .get("days")
                    .and_then(Value::as_i64)
                    .is_some_and(|days| (1..=9).contains(&days))
                && arguments
                    .get("unit")
                    .is_none_or(|unit| unit == "C" || unit == "F")
                && arguments.get("exact").is_none_or(Value::is_boolean)
                && arguments
                    .get("place")
                    .is_none_or(|place| place["lat"].is_number())
                && arguments.get("tags").is_none_or(Value::is_array)
        }
        "get_time" => arguments.is_empty(),
        "log" => true,
        _ => false,
    }
}

#[test]
fn whatever_is_allowed_is_read_back() {
    for (parser, prefixes) in [
        (ToolParser::Hermes, vec!["<tool_call>"]),
        (ToolParser::Llama3Json, vec!["{", "<|python_tag|>"]),
        (
            ToolParser::Mistral,
            vec!["[TOOL_CALLS]", "[TOOL_CALLS]get{", "[TOOL_CALLS] ["],
        ),
        (ToolParser::Pythonic, vec!["[get(", "[get_time(", "[log("]),
        (
            ToolParser::Qwen3,
            vec!["<tool_call>\n{", "<tool_call>\n<", "<function="],
        ),
    ] {
        let language = Language::new(parser, &tools(), true, false);
        for prefix in prefixes {
            let mut dice = Dice(1);
            let walks = (0..WALKS).filter_map(|_| walk(&language, prefix, &mut dice));
            let texts: Vec<String> = walks.collect();
            assert!(
                texts.len() >= WALKS as usize / 4,
                "{parser}: {prefix}: {} end",
                texts.len()
            );
            for text in texts {
                let calls = language.parse(&text).calls;
                assert!(!calls.is_empty(), "{parser}: {text}");
                for call in calls {
                    let arguments = serde_json::from_str(&call.arguments);
                    let arguments: Map<String, Value> =
                        arguments.unwrap_or_else(|error| panic!("{error}: {text}"));
                    assert!(follows(&call.name, &arguments), "{parser}: {text}: {call:?}");
                }
            }
        }
    }
}

/// As large as sets of tools are: compiled within the limits, and before a client notices.
#[test]
fn many_functions_of_many_arguments_compile() {
    let kinds = [
        json!({"type": "string"}),
        json!({"type": "integer"}),
        json!({"enum": ["a", "b", "c"]}),
        json!({"type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}}}}),
    ];
    let properties = (0..12).map(|at| (format!("property_{at}"), kinds[at % kinds.len()].clone()));
    let properties = Value::Object(properties.collect());
    let parameters = json!({"type": "object", "properties": properties, "required": ["property_0", "property_3"],
        "additionalProperties": false});
    let functions = (0..64).map(|at| function(&format!("function_{at}"), at % 2 == 0, parameters.clone()));
    let tools = Value::Array(functions.collect());
    for name in ToolParser::NAMES {
        let language = Language::new(name.parse().expect("a parser"), &tools, true, true);
        assert!(language.accepts("Hello."), "{name}");
    }
}

//! Every grammar over a vocabulary of single bytes and the parsers' marks: what it accepts, and what the parser makes of that.

use std::sync::Arc;

use phalanx_proto::v1;
use serde_json::{Value, json};

use super::*;
use crate::{
    engine::{Grammar, GrammarStatus},
    text::{
        OutputPlan, Parsed, SpecialTokens, TokenEncoding,
        output::ToolPlan,
        structured::{GrammarCompiler, lark},
        tokenizer::{EntryKind, TokenEntry},
        tools::ToolChoice,
    },
};

pub(super) const EOS: u32 = 128;
const MARKS: [&str; 8] = [
    "<end>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    "<tool_call>",
];

/// Printable ASCII by its codes, and the marks from [`EOS`] on: as special tokens, or all but the first as text alone.
fn table(has_marks: bool) -> Arc<TokenTable> {
    let count = if has_marks { MARKS.len() } else { 1 };
    let ascii = (0..128u8).map(|code| (char::from(code).to_string(), EntryKind::Added));
    let marks = MARKS[..count]
        .iter()
        .map(|mark| ((*mark).to_owned(), EntryKind::Special));
    let entries: Vec<_> = ascii.chain(marks).collect();
    let entries = entries.iter().map(|(text, kind)| {
        let (text, kind) = (text.as_str(), *kind);
        Some(TokenEntry { text, kind })
    });
    Arc::new(TokenTable::build(TokenEncoding::ByteLevel, entries).expect("within the limits"))
}

/// One parser's grammar for some tools.
pub(super) struct Language {
    parser: ToolParser,
    tools: Arc<ToolSet>,
    parallel: bool,
    table: Arc<TokenTable>,
    compiler: GrammarCompiler,
    spec: v1::StructuredOutputs,
}

impl Language {
    pub(super) fn new(parser: ToolParser, tools: &Value, parallel: bool, has_marks: bool) -> Self {
        let table = table(has_marks);
        let special = SpecialTokens {
            eos: Some(EOS),
            end_of_generation: vec![EOS],
            ..SpecialTokens::default()
        };
        let tools = Arc::new(ToolSet::parse(&tools.to_string()).expect("valid"));
        let constraint = parser.constraint(&tools, parallel, &table).expect("enforceable");
        let spec = v1::StructuredOutputs {
            constraint: Some(constraint.expect("a strict function")),
            ..v1::StructuredOutputs::default()
        };
        let compiler = GrammarCompiler::new(table.clone(), special, table.len() as u32, 2);
        compiler.compile(&spec).expect("compiles");
        Self {
            parser,
            tools,
            parallel,
            table,
            compiler,
            spec,
        }
    }

    pub(super) fn begin(&self) -> Box<dyn Grammar> {
        self.compiler.compile(&self.spec).expect("compiled before")
    }

    /// Whether `text`, with its marks as the vocabulary has them, is a whole text of the language.
    pub(super) fn accepts(&self, text: &str) -> bool {
        let mut grammar = self.begin();
        let pieces = lark::pieces(text, &self.table);
        let tokens = pieces.iter().flat_map(|piece| match piece {
            lark::Piece::Text(text) => text.bytes().map(u32::from).collect(),
            lark::Piece::Special(id) => vec![*id],
        });
        let mut is_over = false;
        for token in tokens {
            if is_over || !grammar.allowed().expect("simple").contains(token) {
                return false;
            }
            is_over = grammar.accept(token).expect("it was allowed") == GrammarStatus::Complete;
        }
        is_over || grammar.allowed().expect("simple").contains(EOS)
    }

    pub(super) fn parse(&self, text: &str) -> Parsed {
        let plan = OutputPlan {
            tools: Some(ToolPlan {
                parser: Some(self.parser),
                choice: ToolChoice::Auto,
                tools: self.tools.clone(),
                parallel: self.parallel,
            }),
            ..OutputPlan::default()
        };
        let (mut parser, mut out) = (plan.parser(), Parsed::default());
        parser.push(text, &mut out);
        parser.finish(&mut out);
        out
    }

    /// The language has `text`, and the parser takes it for `content` and these calls.
    #[track_caller]
    fn calls(&self, text: &str, content: &str, calls: &[(&str, Value)]) {
        assert!(self.accepts(text), "{}: {text}", self.parser);
        let parsed = self.parse(text);
        assert_eq!(parsed.content, content, "{text}");
        let read = parsed.calls.iter().map(|call| {
            let arguments: Value = serde_json::from_str(&call.arguments).expect(&call.arguments);
            (call.name.as_str(), arguments)
        });
        assert_eq!(read.collect::<Vec<_>>(), calls, "{text}");
    }

    #[track_caller]
    fn refuses(&self, texts: &[&str]) {
        for text in texts {
            assert!(!self.accepts(text), "{}: {text}", self.parser);
        }
    }
}

pub(super) fn function(name: &str, strict: bool, parameters: Value) -> Value {
    json!({"type": "function", "function": {"name": name, "strict": strict, "parameters": parameters}})
}

/// A strict function with all kinds of arguments, one without any, and one that is not strict.
pub(super) fn tools() -> Value {
    let weather = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"enum": ["C", "F"]},
            "exact": {"type": "boolean"},
            "place": {"$ref": "#/$defs/place"},
            "tags": {"type": "array", "items": {"type": "boolean"}}
        },
        "required": ["city", "days"],
        "additionalProperties": false,
        "$defs": {"place": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"],
            "additionalProperties": false}}
    });
    json!([
        function("get", true, weather),
        function(
            "get_time",
            true,
            json!({"type": "object", "properties": {}, "additionalProperties": false})
        ),
        function(
            "log",
            false,
            json!({"type": "object", "properties": {"level": {"type": "integer"}}})
        ),
    ])
}

/// What follows a schema, and what does not.
const GOOD: &str = r#"{"city": "Rome", "days": 3, "exact": true, "place": {"lat": 1.5}}"#;
const BAD: [&str; 4] = [
    r#"{"city": "Rome"}"#,
    r#"{"city": "Rome", "days": 30}"#,
    r#"{"city": 3, "days": 3}"#,
    r#"{"city": "Rome", "days": 3, "more": 1}"#,
];

fn good() -> Value {
    serde_json::from_str(GOOD).expect("JSON")
}

#[test]
fn nothing_is_held_where_no_function_is_strict() {
    let tools = json!([function("log", false, json!({}))]).to_string();
    let tools = ToolSet::parse(&tools).expect("valid");
    for name in ToolParser::NAMES {
        let parser: ToolParser = name.parse().expect("a parser");
        let constraint = parser
            .constraint(&tools, true, &table(true))
            .expect("nothing to enforce");
        assert_eq!(constraint, None, "{name}");
    }
}

#[test]
fn hermes_calls_are_json_between_tags() {
    for has_marks in [true, false] {
        let many = Language::new(ToolParser::Hermes, &tools(), true, has_marks);
        let call = |name: &str, arguments: &str| {
            format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call>")
        };
        many.calls("It is {fine} [so].", "It is {fine} [so].", &[]);
        let two = format!("I look. {}\n{}", call("get", GOOD), call("log", r#"{"x": [1]}"#));
        many.calls(&two, "I look.", &[("get", good()), ("log", json!({"x": [1]}))]);
        many.refuses(
            &BAD.map(|arguments| call("get", arguments))
                .each_ref()
                .map(String::as_str),
        );
        many.refuses(&[
            &call("other", "{}"),
            &call("get_time", r#"{"a": 1}"#),
            &call("log", "3"),
        ]);
        let one = Language::new(ToolParser::Hermes, &tools(), false, has_marks);
        one.calls(&call("get_time", "{}"), "", &[("get_time", json!({}))]);
        one.refuses(&[&two]);
    }
}

#[test]
fn mistral_calls_are_lists_or_names_with_arguments() {
    for has_marks in [true, false] {
        let many = Language::new(ToolParser::Mistral, &tools(), true, has_marks);
        let item = |name: &str, arguments: &str| format!(r#"{{"name": "{name}", "arguments": {arguments}}}"#);
        let get = item("get", GOOD);
        many.calls("No [call] {here}.", "No [call] {here}.", &[]);
        many.calls(&format!("[TOOL_CALLS] [{get}]"), "", &[("get", good())]);
        let two = format!("So: [TOOL_CALLS][{get}, {}]", item("get_time", "{}"));
        many.calls(&two, "So:", &[("get", good()), ("get_time", json!({}))]);
        let named = format!("[TOOL_CALLS]get{GOOD}[TOOL_CALLS]log[ARGS]{{}}");
        many.calls(&named, "", &[("get", good()), ("log", json!({}))]);
        let with_id = format!("[TOOL_CALLS]get[CALL_ID]a1B2c3D4e[ARGS]{GOOD}");
        many.calls(&with_id, "", &[("get", good())]);
        for arguments in BAD {
            let list = format!("[TOOL_CALLS] [{}]", item("get", arguments));
            many.refuses(&[&list, &format!("[TOOL_CALLS]get{arguments}")]);
        }
        many.refuses(&[
            "[TOOL_CALLS]",
            "[TOOL_CALLS] hello",
            "[TOOL_CALLS]other{}",
            "[TOOL_CALLS]get_tim{}",
        ]);
        let one = Language::new(ToolParser::Mistral, &tools(), false, has_marks);
        one.calls(&format!("[TOOL_CALLS] [{get}]"), "", &[("get", good())]);
        one.refuses(&[&two, &named]);
    }
}

#[test]
fn llama_calls_are_the_whole_message() {
    for has_marks in [true, false] {
        let many = Language::new(ToolParser::Llama3Json, &tools(), true, has_marks);
        let call =
            |name: &str, arguments: &str| format!(r#"{{"name": "{name}", "parameters": {arguments}}}"#);
        let get = call("get", GOOD);
        for text in ["", "Hello {you}.", "[1] is a source", "\n\nfunction() {}", "<b>"] {
            assert!(many.accepts(text), "{text}");
            assert!(many.parse(text).calls.is_empty(), "{text}");
        }
        many.calls(&get, "", &[("get", good())]);
        many.calls(&format!("\n {get}"), "", &[("get", good())]);
        many.calls(&get.replace("parameters", "arguments"), "", &[("get", good())]);
        many.calls(&format!("<|python_tag|>{get}"), "", &[("get", good())]);
        let two = format!("{get}; {}", call("get_time", "{}"));
        many.calls(&two, "", &[("get", good()), ("get_time", json!({}))]);
        for arguments in BAD {
            let bad = call("get", arguments);
            many.refuses(&[
                &bad,
                &format!("\n{bad}"),
                &format!("[{bad}]"),
                &format!("; {bad}"),
            ]);
            many.refuses(&[&format!("<|python_tag|>{bad}"), &format!("{get}; {bad}")]);
        }
        many.refuses(&[
            "{",
            "{}",
            "<|python_tag|>print(1)",
            "Well, <|python_tag|>{}",
            &call("other", "{}"),
        ]);
        let one = Language::new(ToolParser::Llama3Json, &tools(), false, has_marks);
        one.calls(&get, "", &[("get", good())]);
        one.refuses(&[&two]);
    }
}

#[test]
fn pythonic_calls_name_their_arguments() {
    for has_marks in [true, false] {
        let many = Language::new(ToolParser::Pythonic, &tools(), true, has_marks);
        for text in [
            "",
            "Hello (you).",
            "[1] is a source",
            "[]",
            "see [this](http://x)",
            "\n[note] f(x)",
        ] {
            assert!(many.accepts(text), "{text}");
            assert!(many.parse(text).calls.is_empty(), "{text}");
        }
        let get = r#"[get(city="Ro\"m\ne\f", days=3, exact=True, place={"lat": 1.5}, tags=[true, false])]"#;
        let all = json!({"city": "Ro\"m\ne\u{c}", "days": 3, "exact": true, "place": {"lat": 1.5}, "tags": [true, false]});
        many.calls(get, "", &[("get", all.clone())]);
        let short = json!({"city": "Rome", "days": 9});
        let two = "[get(city=\"Rome\", days=9), get_time()]";
        many.calls(two, "", &[("get", short.clone()), ("get_time", json!({}))]);
        let unit = json!({"city": "", "days": 1, "unit": "F", "tags": []});
        many.calls(
            "\n[get(city=\"\", days=1, unit=\"F\", tags=[])]",
            "",
            &[("get", unit)],
        );
        let log = "[log(a=None, b='it\\'s', c=[1, {\"x\": null}], d=True, e=-2.5), log()]";
        let logged = json!({"a": null, "b": "it's", "c": [1, {"x": null}], "d": true, "e": -2.5});
        many.calls(log, "", &[("log", logged), ("log", json!({}))]);
        if has_marks {
            many.calls(
                "<|python_start|>[get_time()]<|python_end|>",
                "",
                &[("get_time", json!({}))],
            );
        }
        many.refuses(&[
            "[get(",
            "[get()]",
            "[get(city=\"Rome\")]",
            "[get(days=3)]",
            "[get(city=\"Rome\", days=30)]",
            "[get(city=\"Rome\", days=3, more=1)]",
            "[get(city=\"Rome\", days=3, unit=\"K\")]",
            "[get(city=\"Rome\", days=3, exact=1)]",
            "[get(city=\"Rome\", days=3, place={\"lat\": true})]",
            "[get_time(a=1)]",
            "[other()]",
            "\n [ other(x)",
            "<|python_start|>[other()]",
            "[get_time(), other()]",
        ]);
        let one = Language::new(ToolParser::Pythonic, &tools(), false, has_marks);
        one.calls(get, "", &[("get", all)]);
        one.refuses(&[two]);
    }
}

#[test]
fn pythonic_arguments_may_all_be_left_out() {
    let schema =
        json!({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "null"}, "c": {}}});
    let language = Language::new(
        ToolParser::Pythonic,
        &json!([function("f", true, schema)]),
        true,
        false,
    );
    for (text, arguments) in [
        ("[f()]", json!({})),
        ("[f(a=1)]", json!({"a": 1})),
        ("[f(b=None, c=\"x\")]", json!({"b": null, "c": "x"})),
        ("[f(a=1, c=[])]", json!({"a": 1, "c": []})),
    ] {
        language.calls(text, "", &[("f", arguments)]);
    }
    language.refuses(&["[f(, a=1)]", "[f(a=1, )]", "[f(c=1, a=1)]", "[f(a=1, a=1)]"]);
}

#[test]
fn what_python_cannot_say_is_refused_by_name() {
    let of = |properties: Value| json!({"type": "object", "properties": properties});
    let name = "function.name";
    let parameters = "function.parameters";
    for (tool, field, says) in [
        (function("a b", true, of(json!({}))), name, "Python"),
        (function("f", true, of(json!({"a b": {}}))), parameters, "\"a b\""),
        (function("f", true, of(json!({"a": false}))), parameters, "schema"),
        (
            function("f", true, of(json!({"a": {"$ref": "#"}}))),
            parameters,
            "\"#\"",
        ),
        (
            function("f", true, json!({"type": "array"})),
            parameters,
            "object",
        ),
        (function("f", true, json!({"anyOf": []})), parameters, "`anyOf`"),
        (
            function("f", true, json!({"required": ["a"]})),
            parameters,
            "\"a\"",
        ),
    ] {
        let tools =
            ToolSet::parse(&json!([function("g", false, json!({})), tool]).to_string()).expect("valid");
        let error = ToolParser::Pythonic
            .constraint(&tools, true, &table(true))
            .expect_err("refused");
        assert_eq!(error.param, Some(format!("tools[1].{field}")), "{error}");
        assert!(error.message.contains(says), "{error}");
    }
    let free = json!([function("a b", false, json!({})), function("f", true, json!({}))]);
    Language::new(ToolParser::Pythonic, &free, true, true).calls("[a b()]", "[a b()]", &[]);
}

/// `name` and its arguments between Qwen's tags.
fn tagged(name: &str, arguments: &[(&str, &str)]) -> String {
    let arguments = arguments
        .iter()
        .map(|(name, value)| format!("<parameter={name}>\n{value}\n</parameter>\n"));
    format!("<function={name}>\n{}</function>", arguments.collect::<String>())
}

#[test]
fn qwen_calls_are_tags_or_json_between_tags() {
    for has_marks in [true, false] {
        let many = Language::new(ToolParser::Qwen3, &tools(), true, has_marks);
        let within = |call: &str| format!("<tool_call>\n{call}\n</tool_call>");
        let html = "<b>\"Rome\"</b>\n\n& </parameter";
        let get = tagged(
            "get",
            &[
                ("city", html),
                ("days", "3"),
                ("unit", "C"),
                ("exact", "true"),
                ("place", r#"{"lat": 1.5}"#),
            ],
        );
        let all = json!({"city": html, "days": 3, "unit": "C", "exact": true, "place": {"lat": 1.5}});
        many.calls("a < b, {x} </parameter>", "a < b, {x} </parameter>", &[]);
        many.calls(
            &format!("I look.\n{}", within(&get)),
            "I look.",
            &[("get", all.clone())],
        );
        many.calls(&get, "", &[("get", all.clone())]);
        let json_call = within(&format!(r#"{{"name": "get", "arguments": {GOOD}}}"#));
        let two = format!("{json_call}\n{}", within(&tagged("get_time", &[])));
        many.calls(&two, "", &[("get", good()), ("get_time", json!({}))]);
        let log = within(&tagged("log", &[("level", "3"), ("text", "x")]));
        many.calls(&log, "", &[("log", json!({"level": 3, "text": "x"}))]);
        let empty = tagged("get", &[("city", ""), ("days", "1")]);
        many.calls(&empty, "", &[("get", json!({"city": "", "days": 1}))]);
        for arguments in BAD {
            many.refuses(&[&within(&format!(
                r#"{{"name": "get", "arguments": {arguments}}}"#
            ))]);
        }
        for bad in [
            tagged("get", &[("city", "Rome")]),
            tagged("get", &[("city", "Rome"), ("days", "30")]),
            tagged("get", &[("city", "Rome"), ("days", "3"), ("unit", "K")]),
            tagged("get", &[("city", "Rome"), ("days", "3"), ("more", "K")]),
            tagged("get", &[("city", "Rome</function>"), ("days", "3")]),
            tagged("get", &[("city", "a\n</parameter>b"), ("days", "3")]),
            tagged("other", &[]),
            tagged("get_time", &[("a", "1")]),
        ] {
            many.refuses(&[&bad, &within(&bad)]);
        }
        let one = Language::new(ToolParser::Qwen3, &tools(), false, has_marks);
        one.calls(&within(&get), "", &[("get", all)]);
        one.refuses(&[&two]);
    }
}

#[test]
fn qwens_tags_have_room_for_what_texts_can_be_sure_of() {
    for (schema, texts, others) in [
        (json!({"type": ["string", "null"]}), vec!["null", "x"], vec![]),
        (
            json!({"anyOf": [{"type": "string"}, {"type": "null"}]}),
            vec!["x"],
            vec![],
        ),
        (json!({"const": "x"}), vec!["x"], vec!["y", ""]),
        (
            json!({"type": "string", "enum": ["", "\n a"]}),
            vec!["", "\n a"],
            vec!["a"],
        ),
        (
            json!({"type": ["integer", "boolean"]}),
            vec!["1", "true"],
            vec!["x", "null"],
        ),
        (
            json!({"anyOf": [{"type": "integer"}, {"type": "array"}]}),
            vec!["1", "[]"],
            vec!["{}"],
        ),
        // JSON alone is sure to follow these.
        (json!({"type": "string", "pattern": "^x$"}), vec![], vec!["x"]),
        (json!({"enum": ["x", 1]}), vec![], vec!["x", "1"]),
        (json!({"enum": ["</parameter>"]}), vec![], vec!["</parameter>"]),
        (
            json!({"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/x"}]}),
            vec![],
            vec!["1"],
        ),
    ] {
        let parameters = json!({"type": "object", "properties": {"a": schema}, "required": ["a"],
            "$defs": {"x": {"type": "string"}}});
        let language = Language::new(
            ToolParser::Qwen3,
            &json!([function("f", true, parameters)]),
            true,
            true,
        );
        for text in texts {
            let call = tagged("f", &[("a", text)]);
            assert!(language.accepts(&call), "{schema}: {text}");
            let parsed = language.parse(&call);
            let given: Value = serde_json::from_str(&parsed.calls[0].arguments).expect("JSON");
            let value = if schema.to_string().contains("integer") {
                serde_json::from_str(text).expect("JSON")
            } else {
                Value::from(text)
            };
            assert_eq!(given, json!({"a": value}), "{schema}");
        }
        for text in others {
            language.refuses(&[&tagged("f", &[("a", text)])]);
        }
    }
}

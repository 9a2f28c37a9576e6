//! Texts as models write them, and what they must be taken for, however they come.

use proptest::{collection::vec, prelude::*, sample::Index};

use super::*;

const TOOLS: &str = r#"[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"},
    "where": {"type": "object"}, "any": {"anyOf": [{"type": "number"}, {"type": "null"}]}}}}}]"#;

fn plan(parser: Option<ToolParser>, choice: ToolChoice) -> OutputPlan {
    OutputPlan {
        tools: Some(ToolPlan {
            parser,
            choice,
            tools: Arc::new(ToolSet::parse(TOOLS).expect("valid")),
            parallel: true,
        }),
        ..OutputPlan::default()
    }
}

fn auto(parser: ToolParser) -> OutputPlan {
    plan(Some(parser), ToolChoice::Auto)
}

/// What the pieces say when put together. Asserts what holds of every stream.
fn parse<'a>(plan: &OutputPlan, pieces: impl IntoIterator<Item = &'a str>) -> Parsed {
    let mut parser = plan.parser();
    let mut whole = Parsed::default();
    let mut take = |parser: &mut OutputParser, piece: Option<&str>| {
        let mut out = Parsed::default();
        match piece {
            Some(piece) => parser.push(piece, &mut out),
            None => parser.finish(&mut out),
        }
        whole.content.push_str(&out.content);
        whole.reasoning.push_str(&out.reasoning);
        for call in out.calls {
            if call.index as usize == whole.calls.len() {
                assert!(
                    !call.id.is_empty() && !call.name.is_empty(),
                    "a call begins with both"
                );
                whole.calls.push(call);
                continue;
            }
            assert!(call.id.is_empty() && call.name.is_empty());
            assert_eq!(
                call.index as usize,
                whole.calls.len() - 1,
                "calls come one after another"
            );
            whole.calls[call.index as usize]
                .arguments
                .push_str(&call.arguments);
        }
    };
    for piece in pieces {
        take(&mut parser, Some(piece));
    }
    take(&mut parser, None);
    for call in &mut whole.calls {
        call.id.clear();
    }
    whole
}

fn said(content: &str, calls: &[(&str, &str)]) -> Parsed {
    let calls = calls
        .iter()
        .enumerate()
        .map(|(index, (name, arguments))| v1::ToolCall {
            index: index as u32,
            id: String::new(),
            name: (*name).to_owned(),
            arguments: (*arguments).to_owned(),
        });
    Parsed {
        content: content.to_owned(),
        reasoning: String::new(),
        calls: calls.collect(),
    }
}

/// A text, and the content and the calls in it.
type Case = (
    &'static str,
    &'static str,
    &'static [(&'static str, &'static str)],
);

const PARIS: &str = r#"{"city": "Paris"}"#;
const ROME: &str = r#"{"city": "Rome"}"#;

/// Qwen 2.5, Qwen 3 and Hermes 2 Pro.
const HERMES: &[Case] = &[
    (
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>",
        "",
        &[("get_weather", PARIS)],
    ),
    (
        "I'll look.\n\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>\n\
         <tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call>\n",
        "I'll look.",
        &[("get_weather", PARIS), ("get_weather", ROME)],
    ),
    // Arguments first, as Hermes 2 Pro was trained.
    (
        "<tool_call>\n{\"arguments\": {\"city\": \"Paris\"}, \"name\": \"get_weather\"}\n</tool_call>",
        "",
        &[("get_weather", PARIS)],
    ),
    // Tags and brackets within texts; a name with escapes.
    (
        r#"<tool_call>{"name": "a\"b", "arguments": {"s": "} ] \" </tool", "t": [1, {"u": {}}]}}</tool_call>"#,
        "",
        &[("a\"b", r#"{"s": "} ] \" </tool", "t": [1, {"u": {}}]}"#)],
    ),
    // Arguments as a text.
    (
        r#"<tool_call>{"name": "f", "arguments": "{\"a\": 1}"}</tool_call>"#,
        "",
        &[("f", r#"{"a": 1}"#)],
    ),
    (
        "<tool_call>{\"name\": \"now\"}</tool_call> Done.",
        " Done.",
        &[("now", "{}")],
    ),
    // One tag around a list.
    (
        r#"<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]</tool_call>"#,
        "",
        &[("f", "{}"), ("g", "{}")],
    ),
    // Cut short.
    (
        r#"<tool_call>{"name": "get_weather", "arguments": {"city": "Pa"#,
        "",
        &[("get_weather", r#"{"city": "Pa"#)],
    ),
    (
        r#"<tool_call>{"name": "get_wea"#,
        r#"<tool_call>{"name": "get_wea"#,
        &[],
    ),
    // A call that was not closed, and one that was forgotten about.
    (
        "<tool_call>{\"name\": \"f\", \"arguments\": {}}\n<tool_call>{\"name\": \"g\", \"arguments\": {}}",
        "",
        &[("f", "{}"), ("g", "{}")],
    ),
    // No calls.
    ("1 < 2, <b>, <tool_cal", "1 < 2, <b>, <tool_cal", &[]),
    (
        "<tool_call>\nsoon\n</tool_call>",
        "<tool_call>\nsoon\n</tool_call>",
        &[],
    ),
    (
        r#"<tool_call>{"name": 5, "arguments": {}}</tool_call>"#,
        r#"<tool_call>{"name": 5, "arguments": {}}</tool_call>"#,
        &[],
    ),
    (
        r#"<tool_call>{"arguments": {}}</tool_call>"#,
        r#"<tool_call>{"arguments": {}}</tool_call>"#,
        &[],
    ),
    ("Paris. \n", "Paris. \n", &[]),
];

const LLAMA: &[Case] = &[
    (
        r#"{"name": "get_weather", "parameters": {"city": "Paris"}}"#,
        "",
        &[("get_weather", PARIS)],
    ),
    (
        r#"<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}"#,
        "",
        &[("get_weather", PARIS)],
    ),
    (
        "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}; \
         {\"name\": \"get_weather\", \"parameters\": {\"city\": \"Rome\"}}",
        "",
        &[("get_weather", PARIS), ("get_weather", ROME)],
    ),
    (
        "\n{\"name\": \"f\", \"arguments\": {\"a\": null}}\n",
        "",
        &[("f", r#"{"a": null}"#)],
    ),
    // JSON that is an answer.
    (
        r#"{"name": "Bob", "age": 7}"#,
        r#"{"name": "Bob", "age": 7}"#,
        &[],
    ),
    ("[1, 2]", "[1, 2]", &[]),
    (r#"{"name""#, r#"{"name""#, &[]),
    ("It is {warm}.", "It is {warm}.", &[]),
    ("<|python_tag|>print(1)", "<|python_tag|>print(1)", &[]),
];

const MISTRAL: &[Case] = &[
    (
        r#"[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "f", "arguments": {}}]"#,
        "",
        &[("get_weather", PARIS), ("f", "{}")],
    ),
    // From tokenizer version 11 on.
    (
        r#"Let me see.[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]f{"a": ["]", "[ARGS]"]}"#,
        "Let me see.",
        &[("get_weather", PARIS), ("f", r#"{"a": ["]", "[ARGS]"]}"#)],
    ),
    (
        r#"[TOOL_CALLS]get_weather[CALL_ID]ab12cd34e[ARGS]{"city": "Paris"}"#,
        "",
        &[("get_weather", PARIS)],
    ),
    ("[TOOL", "[TOOL", &[]),
    ("[TOOL_CALLS]what now?", "[TOOL_CALLS]what now?", &[]),
    ("[TOOL_CALLS][1]", "[TOOL_CALLS][1]", &[]),
    ("a[0] = b[ARGS]", "a[0] = b[ARGS]", &[]),
];

const PYTHONIC: &[Case] = &[
    ("[get_weather(city='Paris')]", "", &[("get_weather", PARIS)]),
    (
        "[get_weather(city=\"Paris\", days=3, exact=True), a.b(x=[1, (2,)], y={'k': None}), now()]",
        "",
        &[
            ("get_weather", r#"{"city": "Paris", "days": 3, "exact": true}"#),
            ("a.b", r#"{"x": [1, [2]], "y": {"k": null}}"#),
            ("now", "{}"),
        ],
    ),
    (
        "<|python_start|>[f(a='it\\'s (1), [2]'),]<|python_end|>",
        "",
        &[("f", r#"{"a": "it's (1), [2]"}"#)],
    ),
    ("[f(a='x", "", &[("f", r#"{"a": "x"#)]),
    ("[f(a=", "", &[("f", r#"{"a": "#)]),
    // What was told is not taken back.
    ("[f(x)] and", ")] and", &[("f", r#"{"x""#)]),
    ("[1, 2]", "[1, 2]", &[]),
    ("[see below]", "[see below]", &[]),
    ("[]", "[]", &[]),
    ("f(x=1)", "f(x=1)", &[]),
    ("[get_wea", "[get_wea", &[]),
];

const QWEN: &[Case] = &[
    (
        "Sure.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n\
         </parameter>\n</function>\n</tool_call>",
        "Sure.",
        &[("get_weather", r#"{"city": "Paris", "days": 3}"#)],
    ),
    (
        "<tool_call>\n<function=get_weather>\n<parameter=exact>\nTrue\n</parameter>\n<parameter=where>\n\
         {'lat': 1, 'tags': [\"a\"]}\n</parameter>\n<parameter=any>\nNone\n</parameter>\n</function>\n</tool_call>",
        "",
        &[(
            "get_weather",
            r#"{"exact": true, "where": {"lat": 1, "tags": ["a"]}, "any": null}"#,
        )],
    ),
    // Lines and tags within a text; an unknown argument; a number that is none.
    (
        "<tool_call><function=get_weather><parameter=city>\n\n<b>\"A\"</b>\n\n</parameter><parameter=else>\n5\n\
         </parameter><parameter=days>soon</parameter></function></tool_call>",
        "",
        &[(
            "get_weather",
            r#"{"city": "\n<b>\"A\"</b>\n", "else": "5", "days": "soon"}"#,
        )],
    ),
    // Tags that models forget.
    (
        "<function=f>\n<parameter=a>\n1\n<parameter=b>\n2\n</function>\n<tool_call>\n<function=g>\n</tool_call>\nDone",
        "\nDone",
        &[("f", r#"{"a": "1", "b": "2"}"#), ("g", "{}")],
    ),
    ("<tool_call>\n<function=f", "<tool_call>\n<function=f", &[]),
    ("<tool_call> no", "<tool_call> no", &[]),
    (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nPa",
        "",
        &[("get_weather", r#"{"city": "Pa"#)],
    ),
];

fn check(plan: &OutputPlan, cases: &[Case]) {
    for (text, content, calls) in cases {
        let expected = said(content, calls);
        assert_eq!(parse(plan, [*text]), expected, "{text}");
        let chars = text
            .char_indices()
            .map(|(at, char)| &text[at..at + char.len_utf8()]);
        assert_eq!(parse(plan, chars), expected, "by characters: {text}");
    }
}

#[test]
fn hermes_calls() {
    check(&auto(ToolParser::Hermes), HERMES);
}

#[test]
fn llama_calls() {
    check(&auto(ToolParser::Llama3Json), LLAMA);
}

#[test]
fn mistral_calls() {
    check(&auto(ToolParser::Mistral), MISTRAL);
}

#[test]
fn pythonic_calls() {
    check(&auto(ToolParser::Pythonic), PYTHONIC);
}

#[test]
fn qwen_calls_in_either_form() {
    check(&auto(ToolParser::Qwen3), QWEN);
    check(&auto(ToolParser::Qwen3), HERMES);
}

#[test]
fn forced_calls() {
    let required = plan(None, ToolChoice::Required);
    check(
        &required,
        &[
            (
                r#"[{"name": "get_weather", "parameters": {"city": "Paris"}}, {"name": "now", "parameters": {}}]"#,
                "",
                &[("get_weather", PARIS), ("now", "{}")],
            ),
            (
                r#"[{"name":"get_weather","parameters":{"city""#,
                "",
                &[("get_weather", r#"{"city""#)],
            ),
        ],
    );
    let named = plan(None, ToolChoice::Named("get_weather".into()));
    check(&named, &[(PARIS, "", &[("get_weather", PARIS)]), ("", "", &[])]);
    let finished = |plan: &OutputPlan, text| {
        let mut parser = plan.parser();
        parser.push(text, &mut Parsed::default());
        parser.has_called()
    };
    assert!(finished(&required, r#"[{"name": "now", "parameters": {}}]"#));
    assert!(!finished(&named, PARIS), "its reason is `stop`, as with OpenAI");
}

#[test]
fn calls_after_the_first_are_left_out_on_request() {
    let (text, _, _) = HERMES[1];
    let mut plan = auto(ToolParser::Hermes);
    plan.tools.as_mut().expect("set").parallel = false;
    assert_eq!(
        parse(&plan, [text]),
        said("I'll look.", &[("get_weather", PARIS)])
    );
}

#[test]
fn ids_are_as_long_as_the_templates_want() {
    let id = |parser, text| {
        let mut out = Parsed::default();
        auto(parser).parser().push(text, &mut out);
        out.calls[0].id.clone()
    };
    let long = id(ToolParser::Hermes, HERMES[0].0);
    assert!(long.starts_with("chatcmpl-tool-") && long.len() == 46, "{long}");
    let short = id(ToolParser::Mistral, MISTRAL[0].0);
    assert!(
        short.len() == 9 && short.chars().all(|char| char.is_ascii_alphanumeric()),
        "{short}"
    );
}

#[test]
fn reasoning_comes_before_content_and_calls() {
    let mut plan = auto(ToolParser::Hermes);
    plan.reasoning = Some(ReasoningPlan {
        parser: ReasoningParser::Qwen3,
        begins: true,
        include: true,
    });
    let text = format!("<think>\nA <tool_call>?\n</think>\n\n{}", HERMES[1].0);
    let mut expected = said("\n\nI'll look.", HERMES[1].2);
    expected.reasoning = "\nA <tool_call>?\n".into();
    assert_eq!(parse(&plan, [text.as_str()]), expected);
    plan.reasoning = Some(ReasoningPlan {
        parser: ReasoningParser::Qwen3,
        begins: true,
        include: false,
    });
    expected.reasoning.clear();
    assert_eq!(parse(&plan, [text.as_str()]), expected);
}

#[test]
fn names_are_vllms() {
    for name in ToolParser::NAMES {
        assert_eq!(name.parse::<ToolParser>().expect("known").to_string(), name);
    }
    assert_eq!("qwen3_coder".parse(), Ok(ToolParser::Qwen3));
    assert!(
        "openai"
            .parse::<ToolParser>()
            .expect_err("unknown")
            .contains("hermes, llama3_json")
    );
    for name in ReasoningParser::NAMES {
        assert_eq!(name.parse::<ReasoningParser>().expect("known").to_string(), name);
    }
}

/// Pieces of all formats, in any order.
const FRAGMENTS: &[&str] = &[
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "get_weather",
    ">",
    "</function>",
    "<parameter=",
    "city",
    "days",
    "</parameter>",
    "{\"name\": ",
    "\"f\"",
    ", \"arguments\": ",
    "{\"a\": [1, \"x\\\"\"]}",
    "}",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[f(a=",
    "'it\\'s'",
    ", ",
    ")",
    "]",
    "[",
    "<think>",
    "</think>",
    "<|python_tag|>",
    "\n",
    " ",
    "é",
    "7",
    "None",
    ";",
    "<",
    "\\u00",
    "{",
];

fn plans() -> Vec<OutputPlan> {
    let parsers = ["hermes", "llama3_json", "pythonic", "mistral", "qwen3"];
    let mut plans: Vec<OutputPlan> = parsers
        .into_iter()
        .map(|name| auto(name.parse().expect("known")))
        .collect();
    plans.push(plan(None, ToolChoice::Required));
    let mut thinking = auto(ToolParser::Qwen3);
    thinking.reasoning = Some(ReasoningPlan {
        parser: ReasoningParser::Qwen3,
        begins: true,
        include: true,
    });
    plans.push(thinking);
    plans
}

/// `text`, cut before the characters that `cuts` choose.
fn cut<'a>(text: &'a str, cuts: &[Index]) -> Vec<&'a str> {
    let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    let mut places: Vec<usize> = match borders.is_empty() {
        true => Vec::new(),
        false => cuts.iter().map(|cut| *cut.get(&borders)).collect(),
    };
    places.extend([0, text.len()]);
    places.sort_unstable();
    places.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect()
}

proptest! {
    #[test]
    fn any_cuts_give_the_same_parse(
        fragments in vec(proptest::sample::select(FRAGMENTS), 0..24),
        cuts in vec(any::<Index>(), 0..12),
    ) {
        let text = fragments.concat();
        for plan in plans() {
            let whole = parse(&plan, [text.as_str()]);
            prop_assert_eq!(&parse(&plan, cut(&text, &cuts)), &whole);
            let chars = text.char_indices().map(|(at, char)| &text[at..at + char.len_utf8()]);
            prop_assert_eq!(&parse(&plan, chars), &whole);
        }
    }

    #[test]
    fn real_outputs_may_be_cut_anywhere(case: Index, cuts in vec(any::<Index>(), 0..40)) {
        for (parser, cases) in [
            (ToolParser::Hermes, HERMES),
            (ToolParser::Llama3Json, LLAMA),
            (ToolParser::Mistral, MISTRAL),
            (ToolParser::Pythonic, PYTHONIC),
            (ToolParser::Qwen3, QWEN),
        ] {
            let (text, content, calls) = case.get(cases);
            prop_assert_eq!(parse(&auto(parser), cut(text, &cuts)), said(content, calls));
        }
    }
}

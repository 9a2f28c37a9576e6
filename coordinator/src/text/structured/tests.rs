//! The compiler over a vocabulary of single bytes and a few longer tokens.

use std::time::Instant;

use phalanx_proto::{
    step::TokenSet,
    v1::structured_outputs::{Choices, Constraint},
};

use super::*;
use crate::{
    engine::GrammarStatus,
    text::{
        TokenEncoding,
        tokenizer::{EntryKind, TokenEntry},
    },
};

const EOS: u32 = 256;
const TOOL: u32 = 257;
const VOCAB_SIZE: u32 = 300;
/// From [`EOS`] on.
const WORDS: [&str; 10] = [
    "<end>", "<tool>", "true", "\"name\"", "ab", "{\"", "  ", ">a", "<think>", "</think>",
];
const THINK: u32 = 264;
const END_THINK: u32 = 265;

/// Printable ASCII by its codes, then an end token, a special token, and words; the rest has no tokens.
fn compiler() -> GrammarCompiler {
    let texts: Vec<Option<String>> = (0..VOCAB_SIZE)
        .map(|id| match id {
            0..128 => Some(char::from(id as u8).to_string()),
            EOS.. => WORDS.get((id - EOS) as usize).map(ToString::to_string),
            _ => None,
        })
        .collect();
    let entries = texts.iter().enumerate().map(|(id, text)| {
        let special = [EOS, TOOL].contains(&(id as u32));
        Some(TokenEntry {
            text: text.as_deref()?,
            kind: if special {
                EntryKind::Special
            } else {
                EntryKind::Added
            },
        })
    });
    let table = TokenTable::build(TokenEncoding::ByteLevel, entries).expect("within the limits");
    let special = SpecialTokens {
        eos: Some(EOS),
        end_of_generation: vec![EOS],
        ..SpecialTokens::default()
    };
    GrammarCompiler::new(Arc::new(table), special, VOCAB_SIZE, 2)
}

fn spec(constraint: Constraint) -> v1::StructuredOutputs {
    v1::StructuredOutputs {
        constraint: Some(constraint),
        ..v1::StructuredOutputs::default()
    }
}

fn json(schema: &str) -> Constraint {
    Constraint::JsonSchema(schema.into())
}
fn regex(regex: &str) -> Constraint {
    Constraint::Regex(regex.into())
}
fn lark(grammar: &str) -> Constraint {
    Constraint::Grammar(grammar.into())
}
fn choice(choices: &[&str]) -> Constraint {
    Constraint::Choice(Choices {
        choices: choices.iter().map(ToString::to_string).collect(),
    })
}

/// Whether `text`, byte by byte, is a whole text of the language; panics if the mask and the state disagree.
fn accepts(compiler: &GrammarCompiler, constraint: Constraint, text: &str) -> bool {
    let mut grammar = compiler.compile(&spec(constraint)).expect(text);
    let bytes = text.as_bytes();
    for (at, byte) in bytes.iter().enumerate() {
        let allowed = grammar.allowed().expect("simple");
        if !allowed.contains((*byte).into()) {
            return false;
        }
        let status = grammar.accept((*byte).into()).expect("it was allowed");
        if status == GrammarStatus::Complete {
            return at + 1 == bytes.len();
        }
    }
    let ends = grammar.allowed().expect("simple").contains(EOS);
    if ends {
        assert_eq!(grammar.accept(EOS), Ok(GrammarStatus::Complete));
    }
    ends
}

#[track_caller]
fn check(constraint: &Constraint, good: &[&str], bad: &[&str]) {
    let compiler = compiler();
    for text in good {
        assert!(
            accepts(&compiler, constraint.clone(), text),
            "{constraint:?}: {text}"
        );
    }
    for text in bad {
        assert!(
            !accepts(&compiler, constraint.clone(), text),
            "{constraint:?}: {text}"
        );
    }
    assert_eq!(compiler.shared.cache().len(), 1, "compiled once");
}

#[test]
fn json_follows_its_schema() {
    let schema = r##"{"type": "object", "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
        "required": ["name", "age"], "additionalProperties": false, "$defs": {"age": {"type": "integer", "minimum": 0}}}"##;
    check(
        &json(schema),
        &[
            r#"{"name":"x","age":3}"#,
            "{\n  \"name\": \"x\",\n  \"age\": 30\n}",
        ],
        &[
            r#"{"name":"x"}"#,
            r#"{"name":"x","age":-3}"#,
            r#"{"name":3,"age":3}"#,
            r#"{"name":"x","age":3,"z":1}"#,
            "[]",
            "",
        ],
    );
    let any = r#"{"oneOf": [{"type": "boolean"}, {"enum": ["a", "b"]}]}"#;
    check(&json(any), &["true", r#""a""#], &["1", r#""c""#]);
    check(&json("true"), &["1", "[{}]", "null"], &["nul", "[", ""]);
    check(
        &Constraint::JsonObject(true),
        &["{}", r#"{"a":[1]}"#],
        &["[]", "1"],
    );
}

#[test]
fn white_space_is_bounded_and_can_be_forbidden() {
    let constraint = || json(r#"{"type": "array", "items": {"type": "integer"}}"#);
    let compiler = compiler();
    let spaces = |count: usize| format!("[{}1]", " ".repeat(count));
    assert!(accepts(&compiler, constraint(), &spaces(40)));
    assert!(!accepts(&compiler, constraint(), &spaces(41)));
    let allows = |spec: &v1::StructuredOutputs, text: &str| {
        let mut grammar = compiler.compile(spec).expect("compiles");
        text.bytes().all(|byte| {
            let allowed = grammar.allowed().expect("simple").contains(byte.into());
            allowed && grammar.accept(byte.into()).is_ok()
        })
    };
    let tight = v1::StructuredOutputs {
        disable_any_whitespace: true,
        ..spec(constraint())
    };
    assert!(allows(&tight, "[1,2") && !allows(&tight, "[1, 2") && !allows(&tight, "[ "));
    let own = v1::StructuredOutputs {
        whitespace_pattern: Some("_".into()),
        ..spec(constraint())
    };
    assert!(allows(&own, "[_1") && !allows(&own, "[ ") && !allows(&own, "[__"));
    assert_eq!(
        compiler.shared.cache().len(),
        3,
        "options are part of the language"
    );
}

#[test]
fn regexes_choices_and_grammars_are_what_they_say() {
    check(&regex("^[a-c]{2,3}$"), &["ab", "abc"], &["a", "abcd", "xy", ""]);
    check(&regex(r"\d+\$"), &["12$"], &["12", "$"]);
    check(&regex("a/b|\"c"), &["a/b", "\"c"], &["a"]);
    check(
        &choice(&["yes", "no", "no \"way\"\\"]),
        &["yes", "no", "no \"way\"\\"],
        &["ye", "no ", "maybe"],
    );
    check(
        &lark("start: \"(\" start \")\" | /[a-z]+/"),
        &["abc", "((x))"],
        &["((x)", "X", ""],
    );
    let sql =
        "root ::= select \nselect ::= \"SELECT \" col \" FROM \" col\ncol ::= \"c_\" [0-9]{1,2} | \"*\"";
    check(
        &lark(sql),
        &["SELECT * FROM c_12"],
        &["SELECT * FROM ", "SELECT x"],
    );
}

#[test]
fn tags_stand_in_free_text() {
    let old = r#"{"type": "structural_tag", "triggers": ["<f"],
        "structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}]}"#;
    check(
        &Constraint::StructuralTag(old.into()),
        &["", "hello", "call <f=a>12</f> and <f=a>3</f>", "<g>"],
        &["call <f=b>", "<f=a>x</f>", "<f=a>12"],
    );
    let format = r#"{"type": "structural_tag", "format": {"type": "sequence", "elements": [
        {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"},
        {"type": "or", "elements": [
            {"type": "const_string", "value": "ok"},
            {"type": "tags_with_separator", "separator": ",", "at_least_one": true, "tags": [
                {"type": "tag", "begin": "<", "content": {"type": "regex", "pattern": "[0-9]+"}, "end": ">"}]}]}]}}"#;
    check(
        &Constraint::StructuralTag(format.into()),
        &["<think>a < b</think>ok", "<think></think><1>,<22>"],
        &[
            "ok",
            "<think>x</think>",
            "<think>x</think><1>,",
            "<think>x</think>okay",
        ],
    );
}

#[test]
fn special_tokens_are_no_text_but_can_be_named() {
    let compiler = compiler();
    let mut free = compiler.compile(&spec(regex("(?s:.)*"))).expect("compiles");
    let allowed = free.allowed().expect("simple");
    assert!(allowed.contains(EOS) && allowed.contains(b'<'.into()) && !allowed.contains(TOOL));
    assert!(
        !allowed.contains(200) && !allowed.contains(VOCAB_SIZE - 1),
        "no tokens"
    );
    let tag = r#"{"format": {"type": "triggered_tags", "triggers": ["<tool>"], "stop_after_first": true, "tags": [
        {"type": "tag", "begin": "<tool>{", "content": {"type": "json_schema", "json_schema": {"type": "null"}}, "end": "}"}]}}"#;
    let mut tagged = compiler
        .compile(&spec(Constraint::StructuralTag(tag.into())))
        .expect("compiles");
    let text = [b'a'.into(), TOOL]
        .into_iter()
        .chain("{null}".bytes().map(u32::from));
    let statuses: Vec<_> = text
        .map(|token| {
            assert!(tagged.allowed().expect("simple").contains(token), "{token}");
            tagged.accept(token).expect("allowed")
        })
        .collect();
    assert_eq!(statuses.last(), Some(&GrammarStatus::Complete));
}

#[test]
fn forks_go_their_own_ways() {
    let compiler = compiler();
    let mut first = compiler.compile(&spec(regex("ab|ac"))).expect("compiles");
    assert_eq!(first.accept(b'a'.into()), Ok(GrammarStatus::Open));
    let mut second = first.fork();
    assert_eq!(second.accept(b'b'.into()), Ok(GrammarStatus::Complete));
    assert!(first.allowed().expect("simple").contains(b'c'.into()));
    let mut third = compiler.compile(&spec(regex("ab|ac"))).expect("cached");
    assert!(
        third.allowed().expect("simple").contains(b'a'.into()),
        "at its beginning"
    );
    assert!(first.accept(b'z'.into()).is_err());
}

#[test]
fn a_grammar_may_begin_behind_the_reasoning() {
    let compiler = compiler();
    let grammar = compiler.compile(&spec(choice(&["ab"]))).expect("a choice");
    let mut grammar = compiler.after_reasoning(grammar);
    let overshooting = EOS + WORDS.iter().position(|word| *word == ">a").expect("a word") as u32;
    for byte in "so <</think".bytes() {
        let allowed = grammar.allowed().expect("anything");
        assert!(allowed.contains(byte.into()) && allowed.contains(EOS) && allowed.contains(b'a'.into()));
        assert_eq!(grammar.accept(byte.into()), Ok(GrammarStatus::Open));
    }
    let allowed = grammar.allowed().expect("anything");
    assert!(allowed.contains(b'>'.into()) && !allowed.contains(overshooting));
    let mut other = grammar.fork();
    assert_eq!(other.accept(b' '.into()), Ok(GrammarStatus::Open));
    let allowed = other.allowed().expect("anything");
    assert!(allowed.contains(overshooting), "the mark is broken off");
    assert_eq!(grammar.accept(b'>'.into()), Ok(GrammarStatus::Open));
    let allowed = grammar.allowed().expect("a choice");
    assert!(allowed.contains(b'a'.into()) && !allowed.contains(b'b'.into()) && !allowed.contains(EOS));
    assert_eq!(grammar.accept(b'a'.into()), Ok(GrammarStatus::Open));
    assert_eq!(grammar.accept(b'b'.into()), Ok(GrammarStatus::Complete));
}

/// Reasoning of at most `budget` tokens, ended by `end`, behind a prompt of bytes.
fn thinking(budget: u32, end: &[u32], prompt: &str, grammar: Option<Box<dyn Grammar>>) -> Box<dyn Grammar> {
    let limit = ThinkingLimit {
        budget,
        end_tokens: end.into(),
        has_begun: false,
    };
    let prompt: Vec<u32> = prompt.bytes().map(u32::from).collect();
    compiler().limit_thinking(limit, &prompt, grammar)
}

/// Goes on by `tokens`, each of which must be allowed and not the only one.
#[track_caller]
fn go_freely(grammar: &mut Box<dyn Grammar>, tokens: &[u32]) {
    for &token in tokens {
        let allowed = grammar.allowed().expect("anything");
        assert!(allowed.contains(token) && allowed.contains(EOS), "{token}");
        assert_eq!(grammar.accept(token), Ok(GrammarStatus::Open));
    }
}

/// Goes on by `tokens`, each of which must be the only one that is allowed.
#[track_caller]
fn go_forced(grammar: &mut Box<dyn Grammar>, tokens: &[u32]) {
    for &token in tokens {
        let mut only = TokenSet::empty(VOCAB_SIZE);
        only.insert(token);
        assert_eq!(grammar.allowed(), Ok(only), "{token}");
        assert_eq!(grammar.accept(token), Ok(GrammarStatus::Open));
    }
}

#[test]
fn thinking_ends_when_its_budget_is_spent() {
    let (a, end) = (u32::from(b'a'), [END_THINK]);
    let mut begun = thinking(3, &end, "<think></think><think>\n", None);
    go_freely(&mut begun, &[a, a, THINK]);
    let mut other = begun.fork();
    go_forced(&mut other, &end);
    go_freely(&mut other, &[a, THINK, a, a, a, a, a]);

    let mut none = thinking(0, &end, "<think>", None);
    go_forced(&mut none, &end);

    let mut later = thinking(2, &end, "<think></think>", None);
    go_freely(&mut later, &[a, a, a, a, THINK, a, a]);
    go_forced(&mut later, &end);

    let mut own_end = thinking(2, &end, "<think>", None);
    go_freely(&mut own_end, &[a, END_THINK, a, a, a, THINK, a, a, a]);
}

#[test]
fn a_mark_of_several_tokens_goes_on_where_it_has_begun() {
    let spelled: Vec<u32> = "</think>".bytes().map(u32::from).collect();
    let mut cut = thinking(2, &spelled, "<think>", None);
    go_freely(&mut cut, &[b'a'.into(), b'<'.into()]);
    go_forced(&mut cut, &spelled[1..]);
    go_freely(&mut cut, &spelled);
    let mut whole = thinking(1, &spelled, "<think>", None);
    go_freely(&mut whole, &[b'a'.into()]);
    go_forced(&mut whole, &spelled);
    // Its tokens are not cut where the text is.
    let mut anew = thinking(1, &[END_THINK], "<think>", None);
    go_freely(&mut anew, &[b'<'.into()]);
    go_forced(&mut anew, &[END_THINK]);
    go_freely(&mut anew, &[b'a'.into(); 3]);
}

#[test]
fn a_grammar_begins_where_the_budget_ends() {
    let compiler = compiler();
    let grammar = compiler.compile(&spec(choice(&["ab"]))).expect("a choice");
    let grammar = compiler.after_reasoning(grammar);
    let mut grammar = thinking(2, &[END_THINK], "<think>", Some(grammar));
    go_freely(&mut grammar, &[b'x'.into(), b'y'.into()]);
    go_forced(&mut grammar, &[END_THINK]);
    let allowed = grammar.allowed().expect("a choice");
    assert!(allowed.contains(b'a'.into()) && !allowed.contains(b'x'.into()) && !allowed.contains(EOS));
    assert_eq!(grammar.accept(b'a'.into()), Ok(GrammarStatus::Open));
    assert_eq!(grammar.accept(b'b'.into()), Ok(GrammarStatus::Complete));
}

/// What cannot be used is refused soon, with the field and the reason.
#[test]
fn bad_grammars_are_refused_in_time() {
    let compiler = compiler();
    let nested = |open: &str, inner: &str, close: &str, count: usize| {
        format!("{}{inner}{}", open.repeat(count), close.repeat(count))
    };
    let cases: Vec<(Constraint, &str, &str)> = vec![
        (json("{\"type\":"), "json", "JSON"),
        (json("[]"), "json", "schema"),
        (json(r#"{"type": "nothing"}"#), "json", ""),
        (
            json(r#"{"type": "integer", "minimum": 3, "maximum": 2}"#),
            "json",
            "",
        ),
        (json(r##"{"$ref": "#/nowhere"}"##), "json", ""),
        (json(r#"{"$ref": "http://example.com/schema"}"#), "json", ""),
        (json(r#"{"type": "string", "pattern": "("}"#), "json", ""),
        (json(&nested("{\"not\":", "{}", "}", 100)), "json", "64"),
        (json(&nested("[", "", "]", 100_000)), "json", ""),
        (json(&format!("\"{}\"", "x".repeat(300_000))), "json", "262144"),
        (
            json(r#"{"type": "object", "x-guidance": {"nope": 1}}"#),
            "json",
            "",
        ),
        (Constraint::JsonObject(false), "json_object", "true"),
        (regex(""), "regex", "empty"),
        (regex("("), "regex", ""),
        (regex("(?=a)b"), "regex", ""),
        (regex(r"(a)\1"), "regex", ""),
        (regex(&"a".repeat(20_000)), "regex", "16384"),
        (regex(&nested("(", "a", ")", 3000)), "regex", ""),
        (choice(&[]), "choice", "0 entries"),
        (choice(&["a", ""]), "choice", "[1]"),
        (choice(&vec!["x"; 5000]), "choice", "4096"),
        (lark(""), "grammar", "empty"),
        (lark("nonsense"), "grammar", ""),
        (lark("start: other"), "grammar", ""),
        (
            lark(&format!("start: {}", nested("(", "\"a\"", ")", 5000))),
            "grammar",
            "64",
        ),
        (lark("root ::= x"), "grammar", "not defined"),
        (Constraint::StructuralTag("{}".into()), "structural_tag", "needs"),
        (Constraint::StructuralTag("[".into()), "structural_tag", ""),
    ];
    for (constraint, field, part) in cases {
        let start = Instant::now();
        let name = format!("{constraint:.80?}");
        let error = compiler.compile(&spec(constraint)).expect_err(&name);
        assert!(
            start.elapsed() < 2 * COMPILE_LIMIT,
            "{name}: {:?}",
            start.elapsed()
        );
        assert_eq!(error.kind, ErrorKind::InvalidArgument, "{name}");
        assert_eq!(error.param, Some(format!("structured_outputs.{field}")), "{name}");
        assert!(error.message.contains(part), "{name}: {error}");
        assert!(error.message.len() < 600, "{name}: {error}");
    }
    let nothing = compiler
        .compile(&v1::StructuredOutputs::default())
        .expect_err("no constraint");
    assert_eq!(nothing.param.as_deref(), Some("structured_outputs"));
    let mut named = spec(regex("("));
    named.param = "guided_regex".into();
    let error = compiler.compile(&named).expect_err("no regex");
    assert_eq!(error.param.as_deref(), Some("guided_regex"));
}

/// Whatever they look like, they compile or are refused in time, and no token takes long.
#[test]
fn pathological_grammars_hang_nothing() {
    let compiler = compiler();
    let wide: Vec<String> = (0..3000)
        .map(|i| format!("\"p{i}\": {{\"type\": \"string\"}}"))
        .collect();
    let cases = [
        regex("(a*)*b"),
        regex("(a|aa)+$"),
        regex("(((a{1,100}){1,100}){1,100}){1,100}"),
        regex("a{1,1000000000}"),
        regex(r"(\w{1,500}\s?){1,500}"),
        regex("(.*a){20}.*"),
        regex("[ab]*a[ab]{200}"),
        json(r#"{"type": "string", "maxLength": 1000000000, "pattern": "^(a|b|ab)*$"}"#),
        json(r#"{"type": "array", "items": {}, "minItems": 1000000000}"#),
        json(r#"{"type": "array", "uniqueItems": true, "maxItems": 100000000}"#),
        json(r##"{"$ref": "#"}"##),
        json(r##"{"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}]}"##),
        json(r##"{"allOf": [{"properties": {"a": {"$ref": "#"}}}, {"properties": {"a": {"$ref": "#"}}}]}"##),
        json(&format!(
            "{{\"type\": \"object\", \"properties\": {{{}}}}}",
            wide.join(",")
        )),
        lark("start: start start | \"a\" | \"\""),
        lark("start: /a/ start"),
        lark("start: a* b*\na: \"x\" | a a\nb: a | b a b"),
        lark(&format!("start: {}", "(\"a\" | \"b\") ".repeat(2000))),
    ];
    for constraint in cases {
        let name = format!("{constraint:.80?}");
        let start = Instant::now();
        let compiled = compiler.compile(&spec(constraint));
        assert!(
            start.elapsed() < 2 * COMPILE_LIMIT,
            "{name}: {:?}",
            start.elapsed()
        );
        let Ok(mut grammar) = compiled else { continue };
        for _ in 0..30 {
            let start = Instant::now();
            let Ok(allowed) = grammar.allowed() else { break };
            let next = (0..VOCAB_SIZE).find(|&id| id != EOS && allowed.contains(id));
            let accepted = next.map(|next| grammar.accept(next));
            assert!(start.elapsed().as_millis() < 500, "{name}: {:?}", start.elapsed());
            if !matches!(accepted, Some(Ok(GrammarStatus::Open))) {
                break;
            }
        }
    }
}

#[test]
fn the_cache_forgets_what_was_used_least_recently() {
    let compiler = compiler();
    let nth = |i: usize| spec(regex(&format!("a{{{i}}}")));
    for i in 1..=CACHED_GRAMMARS + 3 {
        compiler.compile(&nth(i)).expect("compiles");
        compiler.compile(&nth(1)).expect("stays");
    }
    let mut cache = compiler.shared.cache();
    assert_eq!(cache.len(), CACHED_GRAMMARS);
    assert!(cache.get(&nth(1)).is_some() && cache.get(&nth(2)).is_none());
}

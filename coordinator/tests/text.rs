//! Text to tokens and back, against Hugging Face's and SentencePiece's own answers.

mod support;

use std::{fs, path::Path, sync::LazyLock};

use phalanx_coordinator::text::{
    Detokenizer, GgufVocab, StopMatcher, TextError, TextModel, TextProcessor, Tokenizer,
};
use phalanx_proto::{ErrorKind, RpcError, v1};
use proptest::{collection::vec, prelude::*};
use serde_json::{Value, json};
use support::{demo_model, demo_processor};

static DEMO: LazyLock<Tokenizer> = LazyLock::new(|| demo_model().tokenizer);
static PROCESSOR: LazyLock<TextProcessor> = LazyLock::new(|| demo_processor(8192));

/// The ids are those of Hugging Face's `tokenizers` 0.23 (Python) with SmolLM2's tokenizer.json pipeline.
#[test]
fn demo_tokens_are_hugging_faces() {
    let cases: [(&str, &[u32]); 7] = [
        ("Hello world", &[19556, 905]),
        (
            "Hello, world! It's 2024.",
            &[19556, 28, 905, 17, 657, 506, 216, 34, 32, 34, 36, 30],
        ),
        (
            "  indented\n\tcode = x+1;\n\n\n",
            &[216, 641, 6574, 198, 197, 4635, 446, 1792, 27, 33, 43, 16506],
        ),
        (
            "naïve café — 日本語 🙂👩‍👩‍👧",
            &[
                3546, 46494, 37366, 1841, 17097, 241, 115, 40993, 179, 120, 248, 47526, 10813, 235, 119, 321,
                231, 10813, 235, 119, 321, 231, 10813, 235, 117,
            ],
        ),
        ("<|im_start|>user\nHi<|im_end|>\n", &[1, 4093, 198, 26843, 2, 198]),
        (
            "I'll can't WE'RE 12345 ٣٤",
            &[
                57, 3060, 416, 982, 26587, 23, 3256, 216, 33, 34, 35, 36, 37, 216, 164, 113, 164, 114,
            ],
        ),
        (
            "fn main() {\r\n    println!(\"{}\", 1_000);\r\n}",
            &[
                7853, 1085, 1000, 1662, 3136, 1628, 34115, 17, 43331, 1002, 216, 33, 79, 32, 32, 32, 4258,
                201, 198, 109,
            ],
        ),
    ];
    for (text, ids) in cases {
        assert_eq!(DEMO.encode(text, true).expect("encodes"), ids, "{text:?}");
    }
}

/// 41,225 tokens of 2,000 odd strings, hashed (FNV-1a over ids); the expected value is Hugging Face's.
#[test]
fn many_odd_strings_encode_as_hugging_faces() {
    let alphabet: Vec<char> = "abc XYZ 019'\n\t.,<|>_é日🙂\u{a0}٣½\u{301}".chars().collect();
    let (mut hash, mut count) = (0xcbf2_9ce4_8422_2325_u64, 0);
    for k in 0..2000 {
        let text: String = (0..k % 40)
            .map(|j| alphabet[(k * 7919 + j * 104_729 + (j * j * k) % 97) % alphabet.len()])
            .collect();
        for id in DEMO.encode(&text, true).expect("encodes") {
            hash = (hash ^ u64::from(id)).wrapping_mul(0x0100_0000_01b3);
            count += 1;
        }
    }
    assert_eq!((hash, count), (0xf0d7_d9d6_8683_ed01, 41_225));
}

#[test]
fn demo_special_tokens_have_their_roles() {
    let special = DEMO.special_tokens();
    assert_eq!((special.bos, special.eos), (Some(1), Some(2)));
    // <|endoftext|> ends a text, whatever the file says of <|im_end|>.
    assert_eq!(special.end_of_generation, [0, 2]);
    assert_eq!(special.eos_token.as_deref(), Some("<|im_end|>"));
    assert_eq!(DEMO.decode(&[1, 19556, 2], true), "Hello");
    assert_eq!(DEMO.decode(&[1, 19556, 2], false), "<|im_start|>Hello<|im_end|>");
}

/// Text a byte-level vocabulary of SmolLM2's can spell: it lacks some control bytes and planes 4 and up.
fn spellable() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        4 => "[ -~\n\t]{0,12}",
        2 => "[\u{a0}-\u{ffff}]{0,6}",
        1 => "[\u{10000}-\u{3ffff}]{0,4}",
        1 => Just("    return x + 1\r\n".to_owned()),
        1 => Just("👩‍👩‍👧 e\u{301}".to_owned()),
    ];
    vec(word, 0..6).prop_map(|words| words.concat())
}

/// Feeds `tokens` one by one and returns every piece of text.
fn deltas(tokens: &[u32], skip_special_tokens: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(DEMO.table().clone(), skip_special_tokens);
    let mut deltas: Vec<String> = tokens
        .iter()
        .map(|&token| {
            let mut delta = String::new();
            detokenizer.push(token, &mut delta);
            delta
        })
        .collect();
    let mut last = String::new();
    detokenizer.finish(&mut last);
    deltas.push(last);
    deltas
}

proptest! {
    #[test]
    fn text_survives_the_round_trip_and_never_shows_half_a_character(text in spellable()) {
        let tokens = DEMO.encode(&text, true).expect("encodes");
        let deltas = deltas(&tokens, false);
        prop_assert_eq!(deltas.concat(), text.clone());
        let half = |text: &str| text.contains(char::REPLACEMENT_CHARACTER);
        prop_assert!(half(&text) || !deltas.iter().any(|delta| half(delta)));
    }

    #[test]
    fn any_tokens_decode_to_their_bytes(tokens in vec(0u32..49_200, 0..40), skip: bool) {
        let bytes: Vec<u8> = tokens
            .iter()
            .filter(|&&token| !(skip && DEMO.table().is_special(token)))
            .flat_map(|&token| DEMO.table().bytes(token).to_vec())
            .collect();
        prop_assert_eq!(deltas(&tokens, skip).concat(), String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn stop_strings_are_found_across_tokens(text in "[ab \n]{0,30}", stop in vec("[ab \n]{1,3}", 1..3)) {
        let mut matcher = StopMatcher::new(&stop, false).expect("within the limits");
        let mut out = String::new();
        let tokens = DEMO.encode(&text, true).expect("encodes");
        let found = deltas(&tokens, false).iter().find_map(|delta| matcher.push(delta, true, &mut out));
        match found {
            Some(found) => {
                prop_assert!(text[out.len()..].starts_with(&found));
                prop_assert!(stop.iter().all(|stop| !out.contains(stop.as_str())));
            }
            None => prop_assert!(stop.iter().all(|stop| !text.contains(stop.as_str()))),
        }
    }
}

fn vocab(model: &str, tokens: &[&str]) -> GgufVocab {
    GgufVocab {
        model: model.into(),
        pre: Some("smollm".into()),
        tokens: tokens.iter().map(|&token| token.to_owned()).collect(),
        ..GgufVocab::default()
    }
}

/// The fixture is a model that Google's SentencePiece trained, with that library's own encodings.
#[test]
fn sentencepiece_vocabularies_encode_as_sentencepiece() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sentencepiece_bpe.json");
    let fixture: Value = serde_json::from_slice(&fs::read(path).expect("there")).expect("JSON");
    let list = |key: &str| fixture[key].as_array().expect("a list").iter();
    let id = |key: &str| fixture[key].as_u64().map(|id| id as u32);
    let tokenizer = Tokenizer::from_gguf(&GgufVocab {
        model: "llama".into(),
        tokens: list("tokens")
            .map(|token| token.as_str().expect("text").to_owned())
            .collect(),
        scores: list("scores")
            .map(|score| score.as_f64().expect("a number") as f32)
            .collect(),
        token_types: list("token_types")
            .map(|kind| kind.as_i64().expect("a number") as i32)
            .collect(),
        unknown_token_id: id("unknown"),
        bos_token_id: id("bos"),
        eos_token_id: id("eos"),
        ..GgufVocab::default()
    })
    .expect("builds");
    for case in list("cases") {
        let text = case["text"].as_str().expect("text");
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).expect("ids");
        assert_eq!(tokenizer.encode(text, false).expect("encodes"), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true), text);
        let with_bos = tokenizer.encode(text, true).expect("encodes");
        assert_eq!(
            (with_bos[0], &with_bos[1..]),
            (id("bos").expect("has one"), &ids[..])
        );
    }
}

#[test]
fn inconsistent_gguf_vocabularies_are_refused_by_name() {
    let ab = || vocab("gpt2", &["a", "b", "ab"]);
    let cases = [
        (
            GgufVocab {
                tokens: vec![],
                ..ab()
            },
            "tokenizer.ggml.tokens is missing",
        ),
        (
            GgufVocab {
                model: "bert".into(),
                ..ab()
            },
            "tokenizer.ggml.model is \"bert\"",
        ),
        (
            GgufVocab {
                pre: Some("martian".into()),
                ..ab()
            },
            "tokenizer.ggml.pre is \"martian\"",
        ),
        (
            GgufVocab {
                merges: vec!["a c".into()],
                ..ab()
            },
            "Token `c` out of vocabulary",
        ),
        (
            GgufVocab {
                merges: vec!["b a".into()],
                ..ab()
            },
            "Token `ba` out of vocabulary",
        ),
        (
            GgufVocab {
                merges: vec!["ab".into()],
                ..ab()
            },
            "expected two tokens",
        ),
        (
            GgufVocab {
                merges: vec!["a b c".into()],
                ..ab()
            },
            "expected two tokens",
        ),
        (
            GgufVocab {
                token_types: vec![1],
                ..ab()
            },
            "expected 3, one per token",
        ),
        (
            GgufVocab {
                scores: vec![0.0; 4],
                ..ab()
            },
            "expected 3, one per token",
        ),
        (
            GgufVocab {
                eos_token_id: Some(3),
                ..ab()
            },
            "eos_token_id is 3, limit 2",
        ),
        (
            GgufVocab {
                end_of_turn_token_ids: vec![9],
                ..ab()
            },
            "eot_token_id is 9, limit 2",
        ),
        (vocab("llama", &["a"]), "tokenizer.ggml.scores is missing"),
        (
            GgufVocab {
                scores: vec![0.0],
                ..vocab("llama", &["x".repeat(600).as_str()])
            },
            "bytes of a SentencePiece token is 600, limit 512",
        ),
        (
            GgufVocab {
                tokens: vec![String::new(); (1 << 20) + 1],
                ..ab()
            },
            "length of tokenizer.ggml.tokens is 1048577, limit 1048576",
        ),
    ];
    for (vocab, expected) in cases {
        let error = Tokenizer::from_gguf(&vocab).expect_err("refused").to_string();
        assert!(error.contains(expected), "{error:?} does not tell {expected:?}");
    }
}

#[test]
fn every_known_pre_tokenizer_builds_and_cuts() {
    for (pre, tokens) in [
        ("smollm", 5),
        ("gpt-2", 3),
        ("default", 3),
        ("qwen2", 5),
        ("tekken", 5),
        ("llama-bpe", 3),
    ] {
        // Merges digits wherever the pre-tokenizer leaves them together.
        let tokenizer = Tokenizer::from_gguf(&GgufVocab {
            pre: Some(pre.into()),
            merges: vec!["1 2".into(), "12 3".into()],
            bos_token_id: Some(0),
            add_bos_token: Some(false),
            ..vocab("gpt2", &["1", "2", "3", "12", "123", "a", "b"])
        });
        let ids = tokenizer.expect("builds").encode("a123b", true).expect("encodes");
        assert_eq!(ids.len(), tokens, "{pre}: {ids:?}");
    }
}

fn byte_level() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true})
}

/// A model directory with the smallest of tokenizer.json files.
fn model_dir(files: &[(&str, Value)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [
            {"id": 3, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 4, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
        ],
        "pre_tokenizer": byte_level(),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}},
        },
        "decoder": byte_level(),
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    });
    let all = std::iter::once(("tokenizer.json", tokenizer)).chain(files.iter().cloned());
    for (name, json) in all {
        fs::write(dir.path().join(name), json.to_string()).expect("written");
    }
    dir
}

#[test]
fn hugging_face_directories_load() {
    let dir = model_dir(&[
        (
            "tokenizer_config.json",
            json!({
                "bos_token": {"content": "<s>"}, "eos_token": "</s>",
                "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
            }),
        ),
        (
            "generation_config.json",
            json!({"eos_token_id": [4, 1], "temperature": 0.5}),
        ),
    ]);
    let model = TextModel::from_dir(dir.path()).expect("loads");
    assert_eq!(
        model.tokenizer.encode("abba</s>", true).expect("encodes"),
        [3, 2, 1, 0, 4]
    );
    assert_eq!(model.tokenizer.encode("ab", false).expect("encodes"), [2]);
    assert_eq!(model.tokenizer.decode(&[3, 2, 1], true), "abb");
    let special = model.tokenizer.special_tokens();
    assert_eq!((special.bos, special.eos), (Some(3), Some(4)));
    assert_eq!(special.end_of_generation, [1, 4]);
    assert_eq!(model.chat_template.as_deref(), Some("D"));
    assert_eq!(model.tool_template.as_deref(), Some("T"));
    assert_eq!(model.defaults.temperature, Some(0.5));
}

#[test]
fn broken_hugging_face_directories_are_refused_by_file() {
    let empty = tempfile::tempdir().expect("a directory");
    assert!(matches!(
        TextModel::from_dir(empty.path()),
        Err(TextError::Missing {
            field: "tokenizer.json"
        })
    ));
    let vocab = |id: u64| json!({"decoder": byte_level(), "model": {"type": "BPE", "vocab": {"a": id}, "merges": []}});
    for (name, content, expected) in [
        (
            "tokenizer.json",
            json!([]),
            "decoder of tokenizer.json is \"none\"",
        ),
        (
            "tokenizer.json",
            json!({"decoder": byte_level()}),
            "tokenizer.json is not valid",
        ),
        (
            "tokenizer.json",
            json!({"decoder": {"type": "WordPiece"}}),
            "is \"WordPiece\", which is not supported",
        ),
        (
            "tokenizer.json",
            vocab(4_000_000_000),
            "highest token id is 4000000000, limit 1048575",
        ),
        (
            "generation_config.json",
            json!({"eos_token_id": "x"}),
            "generation_config.json is not valid",
        ),
        (
            "generation_config.json",
            json!({"temperature": -1}),
            "temperature must be non-negative",
        ),
        (
            "tokenizer_config.json",
            json!({"eos_token": 3}),
            "tokenizer_config.json is not valid: eos_token",
        ),
    ] {
        let dir = model_dir(&[(name, content)]);
        let error = TextModel::from_dir(dir.path()).expect_err("refused").to_string();
        assert!(error.contains(expected), "{error:?} does not tell {expected:?}");
    }
}

fn chat(messages: &[(&str, &str)]) -> v1::ChatRequest {
    let messages = messages.iter().map(|&(role, content)| v1::ChatMessage {
        role: role.into(),
        content: content.into(),
        ..v1::ChatMessage::default()
    });
    v1::ChatRequest {
        messages: messages.collect(),
        ..v1::ChatRequest::default()
    }
}

fn completion(prompt: v1::generate_request::Prompt) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(prompt),
        ..v1::GenerateRequest::default()
    }
}

#[tokio::test]
async fn demo_conversations_render_as_chatml() {
    let prompt = |request| async { PROCESSOR.prepare_chat(request).await.expect("renders") };
    let text = |tokens: &[u32]| DEMO.decode(tokens, false);

    let prepared = prompt(chat(&[("user", "Hi")])).await;
    assert_eq!(
        text(&prepared.sequences[0].prompt),
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(
        prepared.prompt_tokens as usize,
        prepared.sequences[0].prompt.len()
    );
    assert_eq!(prepared.sequences[0].stop.stop_token_ids, [0, 2]);

    let mut request = chat(&[("system", "S"), ("user", "U"), ("assistant", "A")]);
    request.add_generation_prompt = Some(false);
    request.output = Some(v1::OutputOptions {
        echo: true,
        ..Default::default()
    });
    let prepared = prompt(request).await;
    assert_eq!(
        text(&prepared.sequences[0].prompt),
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    );
    assert_eq!(prepared.echo.as_deref(), Some("A"));
}

#[tokio::test]
async fn prompts_are_checked_before_they_are_queued() {
    use v1::generate_request::Prompt;
    let small = demo_processor(16);
    let ids = |ids: Vec<u32>| Prompt::TokenIds(v1::TokenIds { ids });
    let text = |text: &str| Prompt::Text(text.into());
    let refused = |prompt| async { small.prepare(completion(prompt)).await.expect_err("refused") };
    let kind = |error: &RpcError| (error.kind, error.param.clone().unwrap_or_default());
    let invalid = (ErrorKind::InvalidArgument, "prompt".to_owned());
    let too_long = (ErrorKind::ContextLengthExceeded, "prompt".to_owned());

    assert_eq!(kind(&refused(text("")).await), invalid);
    assert_eq!(kind(&refused(ids(vec![])).await), invalid);
    let error = refused(ids(vec![1, 49_152])).await;
    assert_eq!(kind(&error), invalid);
    assert_eq!(
        error.message,
        "Token id 49152 is out of vocabulary; token ids are below 49152."
    );
    assert_eq!(kind(&refused(ids(vec![1; 16])).await), too_long);
    assert_eq!(kind(&refused(text(&"a b c d ".repeat(9))).await), too_long);
    // More bytes than sixteen of the longest tokens: refused without tokenizing.
    let error = refused(text(&"x".repeat(1 << 20))).await;
    assert_eq!(kind(&error), too_long);
    assert!(error.message.contains("1048576 bytes"), "{}", error.message);
    let error = small
        .prepare(v1::GenerateRequest::default())
        .await
        .expect_err("refused");
    assert_eq!(kind(&error), invalid);
    let error = small
        .prepare_chat(chat(&[("user", "x ".repeat(40).as_str())]))
        .await;
    assert_eq!(error.expect_err("refused").kind, ErrorKind::ContextLengthExceeded);

    let fits = small.prepare(completion(ids(vec![5; 15]))).await.expect("fits");
    assert_eq!(fits.sequences[0].stop.max_tokens, 1);
}

#[tokio::test]
async fn a_model_without_a_template_completes_but_does_not_chat() {
    let mut model = demo_model();
    model.chat_template = None;
    let options = phalanx_coordinator::text::TextOptions {
        limits: PROCESSOR.limits(),
        chat_template: None,
        chat: Default::default(),
        threads: None,
        seed: None,
    };
    let processor = TextProcessor::new(model, options).expect("loads");
    let error = processor
        .prepare_chat(chat(&[("user", "Hi")]))
        .await
        .expect_err("refused");
    assert!(error.message.contains("--chat-template"));
    let prompt = v1::generate_request::Prompt::Text("Hi".into());
    processor.prepare(completion(prompt)).await.expect("completes");
}

//! Whatever a body becomes on its way, it is answered, and never as our fault.

use proptest::{collection::vec, prelude::*, test_runner::TestRunner};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::support::{Script, pair, post_with};

/// A change to the bytes of a body; places are taken modulo its length.
#[derive(Clone, Debug)]
enum Damage {
    Replace(usize, u8),
    Cut(usize, usize),
    Repeat(usize, usize),
    /// Any member of the object gets another value, or the object a new member.
    Member(usize, Value),
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        Just(json!({"role": "user", "content": "x"})),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((any::<String>(), inner), 0..4).prop_map(|members| members.into_iter().collect()),
        ]
    })
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Damage::Replace(at, byte)),
        (any::<usize>(), 1..40_usize).prop_map(|(at, length)| Damage::Cut(at, length)),
        (any::<usize>(), 1..40_usize).prop_map(|(at, length)| Damage::Repeat(at, length)),
        (any::<usize>(), value()).prop_map(|(member, value)| Damage::Member(member, value)),
    ]
}

impl Damage {
    fn inflict(self, body: &mut Vec<u8>) {
        if body.is_empty() {
            return;
        }
        match self {
            Self::Replace(at, byte) => {
                let at = at % body.len();
                body[at] = byte;
            }
            Self::Cut(at, length) => {
                let at = at % body.len();
                body.drain(at..(at + length).min(body.len()));
            }
            Self::Repeat(at, length) => {
                let at = at % body.len();
                let piece = body[at..(at + length).min(body.len())].to_vec();
                body.splice(at..at, piece);
            }
            Self::Member(member, value) => {
                let Ok(Value::Object(mut object)) = serde_json::from_slice(body) else {
                    return;
                };
                if let Some(slot) = object.values_mut().nth(member % 16) {
                    *slot = value;
                } else {
                    object.insert("best_of".to_owned(), value);
                }
                *body = Value::Object(object).to_string().into_bytes();
            }
        }
    }
}

fn whole_bodies() -> [(&'static str, Value); 2] {
    let chat = json!({
        "model": "scripted", "n": 1, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": 3, "stop": ["a", "b"],
        "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "y"}]}],
        "logprobs": true, "top_logprobs": 2, "max_tokens": 4, "chat_template_kwargs": {"a": 1}, "tools": [],
        "stream": true, "stream_options": {"include_usage": true},
    });
    let completion = json!({
        "prompt": [[1, 2], [3]], "max_tokens": 4, "n": 2, "logprobs": 1, "echo": true, "stop": "x", "min_p": 0.1,
        "stop_token_ids": [1, 2], "ignore_eos": false, "skip_special_tokens": true, "presence_penalty": 0.5,
    });
    [("/v1/chat/completions", chat), ("/v1/completions", completion)]
}

#[test]
fn a_damaged_body_is_answered_and_never_as_our_fault() {
    let runtime = Runtime::new().expect("a runtime");
    let (_coordinator, server) = runtime.block_on(pair(Script::Hello));
    let address = server.address;
    let cases = (0..2_usize, vec(damage(), 1..4));
    let outcome = TestRunner::default().run(&cases, |(which, damages)| {
        let (path, body) = &whole_bodies()[which];
        let mut body = body.to_string().into_bytes();
        for damage in damages {
            damage.inflict(&mut body);
        }
        let reply = runtime.block_on(post_with(address, path, "", &body));
        prop_assert!(
            reply.status == 200 || reply.status == 400,
            "{} for {:?}",
            reply.status,
            String::from_utf8_lossy(&body)
        );
        if reply.status == 400 {
            prop_assert!(reply.json()["error"]["message"].is_string());
        }
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}

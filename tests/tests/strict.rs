//! Strict functions on the real model, which may call and need not: it calls in the syntax that it is shown, for a city of
//! which the schema knows nothing, and what comes out follows the schema all the same.

use phalanx_tests::{
    http, root,
    server::{Server, chat},
};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

#[test]
fn llama_calls_follow_their_schemas() {
    let answer = r#"{"name": "get_weather", "parameters": {"city": "CITY", "days": 20}}"#;
    stop(holds("llama3_json", "", answer));
}

#[test]
fn mistral_calls_follow_their_schemas() {
    let answer = r#"[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "CITY", "days": 20}}]"#;
    stop(holds("mistral", "", answer));
}

#[test]
fn qwen_calls_follow_their_schemas() {
    let answer = "<tool_call>\n<function=get_weather>\n<parameter=city>\nCITY\n</parameter>\n<parameter=days>\n20\n\
                  </parameter>\n</function>\n</tool_call>";
    stop(holds("qwen3", "", answer));
}

#[test]
fn pythonic_calls_behind_reasoning_follow_their_schemas() {
    let answer = r#"[get_weather(city="CITY", days=20)]"#;
    let server = holds("pythonic", "<think>They ask about CITY.</think>", answer);
    let mut tool = weather();
    tool["function"]["parameters"]["anyOf"] = json!([{"required": ["city"]}, {"required": ["days"]}]);
    let reply = http::post(&server.address, CHAT, &request(&tool, answer)).expect("a reply");
    assert_eq!(reply.status, 400, "{}", reply.text());
    let error = reply.json()["error"].clone();
    assert_eq!(error["param"], "tools[0].function.parameters", "{error}");
    assert!(
        error["message"].as_str().expect("a text").contains("`anyOf`"),
        "{error}"
    );
    stop(server);
}

fn stop(server: Server) {
    server.wait_idle();
    assert!(server.stop().success());
}

fn weather() -> Value {
    json!({"type": "function", "function": {"name": "get_weather", "strict": true, "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Lyon", "Nice"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": false
    }}})
}

fn request(tool: &Value, answer: &str) -> Value {
    let mut body = chat("What is the weather in Paris?");
    body["tools"] = json!([tool]);
    body["parallel_tool_calls"] = false.into();
    body["chat_template_kwargs"] = json!({"answer": answer});
    body["max_tokens"] = 120.into();
    body["stop"] = "END".into();
    body
}

/// Starts a server with `parser`; a strict function is called as its schema says, one that is not as the model likes, and
/// an answer without a call stays what it is. Each answer stands behind `thought`, if the model is to think.
fn holds(parser: &str, thought: &str, call: &str) -> Server {
    let template = root().join("tests/templates/calls.jinja");
    let template = template.to_string_lossy();
    let mut arguments = vec!["--max-model-len", "2048", "--chat-template", &template];
    arguments.extend(["--enable-auto-tool-choice", "--tool-call-parser", parser]);
    if !thought.is_empty() {
        arguments.extend(["--reasoning-parser", "qwen3"]);
    }
    let server = Server::start(&arguments);
    let ask = |tool: &Value, answer: &str| {
        let body = request(tool, &format!("{thought}{answer}"));
        let reply = http::post(&server.address, CHAT, &body).expect("a reply");
        assert_eq!(reply.status, 200, "{}", reply.text());
        let choice = reply.json()["choices"][0].clone();
        let thinks = choice["message"]["reasoning"]
            .as_str()
            .is_some_and(|text| text.contains("Paris"));
        assert_eq!(thinks, !thought.is_empty(), "{choice}");
        choice
    };
    let arguments_of = |tool: &Value| {
        let choice = ask(tool, call);
        assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
        let calls = choice["message"]["tool_calls"].as_array().expect("calls").clone();
        let [call] = &calls[..] else { panic!("{choice}") };
        assert_eq!(call["function"]["name"], "get_weather", "{choice}");
        let arguments = call["function"]["arguments"].as_str().expect("a text");
        serde_json::from_str::<Value>(arguments).expect(arguments)
    };
    let strict = arguments_of(&weather());
    assert!(strict["city"] == "Lyon" || strict["city"] == "Nice", "{strict}");
    assert!(
        (1..=9).contains(&strict["days"].as_i64().expect("an integer")),
        "{strict}"
    );
    let mut free = weather();
    free["function"]["strict"] = false.into();
    assert_eq!(
        arguments_of(&free),
        json!({"city": "Paris", "days": 20}),
        "the model's own way"
    );

    let choice = ask(&weather(), "It is sunny in CITY.");
    assert_eq!(choice["finish_reason"], "stop", "{choice}");
    let content = choice["message"]["content"].as_str().expect("a text");
    assert!(content.trim().starts_with("It is sunny in"), "{choice}");
    server
}

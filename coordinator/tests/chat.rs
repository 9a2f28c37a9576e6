//! Conversations with tools, documents, open messages and templates of their own, through the text side of a server.

mod support;

use phalanx_coordinator::text::{ChatOptions, ModelLimits, TextOptions, TextProcessor};
use phalanx_proto::{ErrorKind, RpcError, v1};
use support::demo_model;

/// What tools, calls and their answers look like to it.
const TEMPLATE: &str = "{%- if tools %}{% for tool in tools %}T:{{ tool | tojson }}\n{% endfor %}{% endif %}\
    {%- if documents %}D:{{ documents[0].text }}\n{% endif %}\
    {%- for m in messages %}{{ m.role }}:{{ m.content }}\
    {%- if m.reasoning_content %}({{ m.reasoning }}){% endif %}\
    {%- for call in m.tool_calls or [] %}[{{ call.function.name }}{% for key, value in call.function.arguments | items %} \
    {{ key }}={{ value }}{% endfor %}]{% endfor %}\
    {%- if m.tool_call_id %}<{{ m.tool_call_id }}>{% endif %}{{ '\n' }}{% endfor %}\
    {%- if enable_thinking is defined %}think={{ enable_thinking }} {{ reasoning_effort }}\n{% endif %}\
    {%- if add_generation_prompt %}>{% endif %}";
const TOOLS: &str = r#"[{"type": "function", "function": {"name": "f", "description": "x<y",
    "parameters": {"type": "object", "properties": {"z": {}, "a": {}}}}}]"#;

fn options(template: Option<&str>, chat: ChatOptions) -> TextOptions {
    TextOptions {
        limits: ModelLimits {
            max_model_len: 2048,
            vocab_size: 49_152,
            max_logprobs: 20,
        },
        chat_template: template.map(str::to_owned),
        chat,
        threads: Some(1),
        seed: None,
    }
}

fn processor(chat: ChatOptions) -> TextProcessor {
    TextProcessor::new(demo_model(), options(Some(TEMPLATE), chat)).expect("loads")
}

fn hermes() -> ChatOptions {
    ChatOptions {
        tool_parser: Some("hermes".parse().expect("known")),
        ..ChatOptions::default()
    }
}

fn message(role: &str, content: &str) -> v1::ChatMessage {
    v1::ChatMessage {
        role: role.into(),
        content: content.into(),
        ..v1::ChatMessage::default()
    }
}

fn request(messages: Vec<v1::ChatMessage>) -> v1::ChatRequest {
    v1::ChatRequest {
        messages,
        ..v1::ChatRequest::default()
    }
}

async fn prompt(processor: &TextProcessor, request: v1::ChatRequest) -> String {
    let prepared = processor.prepare_chat(request).await.expect("renders");
    processor.tokenizer().decode(&prepared.sequences[0].prompt, false)
}

async fn refusal(processor: &TextProcessor, request: v1::ChatRequest) -> RpcError {
    processor.prepare_chat(request).await.expect_err("refused")
}

#[tokio::test]
async fn tools_calls_and_answers_are_shown_to_the_template() {
    let processor = processor(hermes());
    let mut called = message("assistant", "");
    called.reasoning = Some("Hm.".into());
    called.tool_calls = vec![v1::ToolCall {
        index: 0,
        id: "call-1".into(),
        name: "f".into(),
        arguments: r#"{"z": 1, "a": "b"}"#.into(),
    }];
    let mut answer = message("tool", "42");
    answer.tool_call_id = Some("call-1".into());
    let mut asked = message("user", "");
    asked.text_parts = vec!["one".into(), "two".into()];
    let request = v1::ChatRequest {
        tools_json: TOOLS.into(),
        documents_json: r#"[{"text": "doc"}]"#.into(),
        template_kwargs_json: r#"{"enable_thinking": true}"#.into(),
        reasoning_effort: "low".into(),
        ..request(vec![asked, called, answer])
    };
    let expected = concat!(
        r#"T:{"type": "function", "function": {"name": "f", "description": "x<y", "parameters": "#,
        r#"{"type": "object", "properties": {"z": {}, "a": {}}}}}"#,
        "\nD:doc\nuser:one\ntwo\nassistant:(Hm.)[f z=1 a=b]\ntool:42<call-1>\nthink=True low\n>"
    );
    assert_eq!(prompt(&processor, request).await, expected);
}

#[tokio::test]
async fn tools_that_must_not_be_called_may_be_hidden() {
    let none = || v1::ChatRequest {
        tools_json: TOOLS.into(),
        tool_choice: Some(v1::ToolChoice {
            mode: v1::tool_choice::Mode::None.into(),
            function: String::new(),
        }),
        ..request(vec![message("user", "Hi")])
    };
    // Without a parser, too: nothing is to be parsed.
    assert!(
        prompt(&processor(ChatOptions::default()), none())
            .await
            .starts_with("T:")
    );
    let hidden = ChatOptions {
        exclude_tools_when_none: true,
        ..ChatOptions::default()
    };
    assert_eq!(prompt(&processor(hidden), none()).await, "user:Hi\n>");
}

#[tokio::test]
async fn a_models_template_for_tools_is_used_where_there_are_some() {
    let model = || {
        let mut model = demo_model();
        (model.chat_template, model.tool_template) = (Some("plain".into()), Some("with tools".into()));
        model
    };
    let with = |tools: &str| v1::ChatRequest {
        tools_json: tools.into(),
        ..request(vec![message("user", "Hi")])
    };
    let own = TextProcessor::new(model(), options(None, hermes())).expect("loads");
    assert_eq!(prompt(&own, with("")).await, "plain");
    assert_eq!(prompt(&own, with(TOOLS)).await, "with tools");
    // The server's own template is for all.
    let replaced = TextProcessor::new(model(), options(Some("server's"), hermes())).expect("loads");
    assert_eq!(prompt(&replaced, with(TOOLS)).await, "server's");
}

#[tokio::test]
async fn an_open_message_is_continued_and_may_be_echoed() {
    let processor = processor(ChatOptions::default());
    let open = || v1::ChatRequest {
        continue_final_message: true,
        output: Some(v1::OutputOptions {
            echo: true,
            ..v1::OutputOptions::default()
        }),
        ..request(vec![message("user", "Hi"), message("assistant", "Well, ")])
    };
    let prepared = processor.prepare_chat(open()).await.expect("renders");
    assert_eq!(
        processor.tokenizer().decode(&prepared.sequences[0].prompt, false),
        "user:Hi\nassistant:Well, "
    );
    assert_eq!(prepared.echo.as_deref(), Some("Well, "));
    let both = v1::ChatRequest {
        add_generation_prompt: Some(true),
        ..open()
    };
    let error = refusal(&processor, both).await;
    assert_eq!(error.param.as_deref(), Some("continue_final_message"));
}

#[tokio::test]
async fn a_requests_template_needs_trust() {
    let with = |template: &str| v1::ChatRequest {
        chat_template: template.into(),
        ..request(vec![message("user", "Hi")])
    };
    let error = refusal(&processor(ChatOptions::default()), with("{{ 1 }}")).await;
    assert_eq!(error.param.as_deref(), Some("chat_template"));
    assert!(error.message.contains("--trust-request-chat-template"));
    let trusting = processor(ChatOptions {
        trust_request_template: true,
        ..ChatOptions::default()
    });
    assert_eq!(
        prompt(&trusting, with("<{{ messages[0].content }}>")).await,
        "<Hi>"
    );
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    for (template, param) in [
        ("{% for %}", "chat_template"),
        (&"x".repeat(1 << 17), "chat_template"),
        (endless, "messages"),
    ] {
        let error = refusal(&trusting, with(template)).await;
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (ErrorKind::InvalidArgument, Some(param))
        );
    }
}

#[tokio::test]
async fn the_servers_variables_yield_to_the_requests() {
    let processor = processor(ChatOptions {
        default_template_kwargs: r#"{"enable_thinking": false, "reasoning_effort": "high"}"#.into(),
        ..ChatOptions::default()
    });
    let hi = || request(vec![message("user", "Hi")]);
    assert!(prompt(&processor, hi()).await.contains("think=False high\n"));
    let own = v1::ChatRequest {
        template_kwargs_json: r#"{"enable_thinking": true}"#.into(),
        ..hi()
    };
    assert!(prompt(&processor, own).await.contains("think=True high\n"));
}

#[tokio::test]
async fn bad_conversations_are_refused_by_name() {
    use v1::tool_choice::Mode;
    let processor = processor(hermes());
    let hi = || request(vec![message("user", "Hi")]);
    let choice = |mode: Mode, function: &str| {
        Some(v1::ToolChoice {
            mode: mode.into(),
            function: function.into(),
        })
    };
    let mut called = message("assistant", "");
    called.tool_calls = vec![v1::ToolCall {
        arguments: "{".into(),
        ..v1::ToolCall::default()
    }];
    let large_kwargs = format!(r#"{{"x": "{}"}}"#, "x".repeat(1 << 17));
    let cases = [
        (
            v1::ChatRequest {
                tools_json: "{}".into(),
                ..hi()
            },
            "tools",
        ),
        (
            v1::ChatRequest {
                tools_json: "[1]".into(),
                ..hi()
            },
            "tools[0]",
        ),
        (
            v1::ChatRequest {
                tools_json: TOOLS.into(),
                tool_choice: choice(Mode::Named, "g"),
                ..hi()
            },
            "tool_choice",
        ),
        (
            v1::ChatRequest {
                tool_choice: choice(Mode::Required, ""),
                ..hi()
            },
            "tool_choice",
        ),
        (
            v1::ChatRequest {
                documents_json: "[1]".into(),
                ..hi()
            },
            "documents[0]",
        ),
        (
            v1::ChatRequest {
                documents_json: "{}".into(),
                ..hi()
            },
            "documents",
        ),
        (
            v1::ChatRequest {
                template_kwargs_json: "[]".into(),
                ..hi()
            },
            "chat_template_kwargs",
        ),
        (
            v1::ChatRequest {
                template_kwargs_json: "{".into(),
                ..hi()
            },
            "chat_template_kwargs",
        ),
        (
            v1::ChatRequest {
                template_kwargs_json: r#"{"messages": []}"#.into(),
                ..hi()
            },
            "chat_template_kwargs",
        ),
        (
            v1::ChatRequest {
                template_kwargs_json: r#"{"chat_template": ""}"#.into(),
                ..hi()
            },
            "chat_template_kwargs",
        ),
        (
            v1::ChatRequest {
                template_kwargs_json: large_kwargs,
                ..hi()
            },
            "chat_template_kwargs",
        ),
        (
            request(vec![called]),
            "messages[0].tool_calls[0].function.arguments",
        ),
    ];
    for (request, param) in cases {
        let error = refusal(&processor, request).await;
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (ErrorKind::InvalidArgument, Some(param)),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_forced_call_is_a_constraint_and_needs_no_parser() {
    use v1::tool_choice::Mode;
    let processor = processor(ChatOptions::default());
    let forced = |mode: Mode| v1::ChatRequest {
        tools_json: TOOLS.into(),
        tool_choice: Some(v1::ToolChoice {
            mode: mode.into(),
            function: "f".into(),
        }),
        ..request(vec![message("user", "Hi")])
    };
    for mode in [Mode::Required, Mode::Named] {
        let prepared = processor.prepare_chat(forced(mode)).await.expect("prepared");
        assert!(prepared.sequences[0].constraint.grammar.is_some());
    }
    let mut both = forced(Mode::Required);
    both.sampling = Some(v1::SamplingParams {
        structured_outputs: Some(v1::StructuredOutputs::default()),
        ..v1::SamplingParams::default()
    });
    let error = refusal(&processor, both).await;
    assert_eq!(error.param.as_deref(), Some("tool_choice"));
}

#[tokio::test]
async fn a_model_decides_only_where_the_server_can_read_its_calls() {
    let request = v1::ChatRequest {
        tools_json: TOOLS.into(),
        ..request(vec![message("user", "Hi")])
    };
    let error = refusal(&processor(ChatOptions::default()), request).await;
    assert_eq!(error.param.as_deref(), Some("tool_choice"));
    assert!(error.message.contains("--enable-auto-tool-choice"), "{error}");
}

#[test]
fn bad_default_variables_are_refused_at_load() {
    let chat = ChatOptions {
        default_template_kwargs: "[1]".into(),
        ..ChatOptions::default()
    };
    let error = TextProcessor::new(demo_model(), options(None, chat)).expect_err("refused");
    assert!(
        error.to_string().contains("--default-chat-template-kwargs"),
        "{error}"
    );
}

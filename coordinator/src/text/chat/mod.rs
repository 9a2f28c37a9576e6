//! Chat templates: a conversation becomes the prompt the model was trained on.
//!
//! Templates are Jinja as Hugging Face's `apply_chat_template` runs it: blocks trimmed, Python's string and dictionary
//! methods, `raise_exception`, `strftime_now`, and a `tojson` that spells JSON like Python.

mod functions;

use std::io;

use minijinja::{Environment, ErrorKind as JinjaError, Value, context};
use phalanx_proto::{ErrorKind, RpcError, limits::MAX_MESSAGES, v1::ChatMessage};

use super::{TextError, tokenizer::SpecialTokens};

/// Most bytes of a template's source.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// Template instructions per rendering: about a second of work.
const FUEL: u64 = 10_000_000;
/// Most bytes of `template_kwargs_json`.
pub const MAX_KWARGS_BYTES: usize = 64 << 10;
const NAME: &str = "chat_template";
/// Variables a request cannot replace through `template_kwargs_json`.
const RESERVED: [&str; 7] = [
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
];

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: Value,
}

/// What one rendering depends on.
pub struct Conversation<'a> {
    pub messages: &'a [ChatMessage],
    pub add_generation_prompt: bool,
    /// A JSON object; empty: none.
    pub template_kwargs_json: &'a str,
    /// Most bytes of the rendered prompt.
    pub max_bytes: usize,
}

impl ChatTemplate {
    /// Compiles `source`. Errors: it is too long or not Jinja.
    pub fn new(source: &str, tokens: &SpecialTokens) -> Result<Self, TextError> {
        TextError::check_limit("bytes of the chat template", source.len(), MAX_TEMPLATE_BYTES)?;
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        functions::install(&mut environment);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| TextError::Template(describe(&error)))?;
        Ok(Self {
            environment,
            tokens: context! {
                bos_token => tokens.bos_token,
                eos_token => tokens.eos_token,
                unk_token => tokens.unk_token,
                pad_token => tokens.pad_token,
                tools => Value::from(()),
                documents => Value::from(()),
            },
        })
    }

    /// Renders a prompt. Errors: `InvalidArgument` with the template's own message when it refuses the conversation or
    /// takes too long, `ContextLengthExceeded` when the prompt outgrows its limit.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, RpcError> {
        let messages = messages(conversation.messages)?;
        let kwargs = kwargs(conversation.template_kwargs_json)?;
        let extra = context! { ..kwargs, ..self.tokens.clone() };
        let variables = context! {
            messages => messages,
            add_generation_prompt => conversation.add_generation_prompt,
            ..extra
        };
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| RpcError::new(ErrorKind::Internal, describe(&error)))?;
        let mut prompt = Limited {
            bytes: Vec::new(),
            limit: conversation.max_bytes,
            exceeded: false,
        };
        match template.render_captured_to(variables, &mut prompt) {
            Ok(_) => {}
            Err(_) if prompt.exceeded => {
                let message = format!(
                    "the rendered conversation is longer than {} bytes, which cannot fit the model's context.",
                    prompt.limit
                );
                return Err(RpcError::new(ErrorKind::ContextLengthExceeded, message).with_param("messages"));
            }
            Err(error) => return Err(RpcError::invalid("messages", describe(&error))),
        }
        String::from_utf8(prompt.bytes)
            .map_err(|_| RpcError::new(ErrorKind::Internal, "the chat template rendered invalid UTF-8"))
    }
}

fn messages(messages: &[ChatMessage]) -> Result<Value, RpcError> {
    if messages.is_empty() {
        return Err(RpcError::invalid(
            "messages",
            "messages must hold at least one message.",
        ));
    }
    if messages.len() > MAX_MESSAGES {
        let message = format!(
            "messages has {} messages, at most {MAX_MESSAGES} are allowed.",
            messages.len()
        );
        return Err(RpcError::invalid("messages", message));
    }
    let values = messages.iter().enumerate().map(|(at, message)| {
        if message.role.is_empty() {
            let param = format!("messages[{at}].role");
            return Err(RpcError::invalid(param, "a message's role cannot be empty."));
        }
        let (role, content) = (&message.role, &message.content);
        // A template tells an absent name from an empty one.
        Ok(match &message.name {
            Some(name) => context! { role, content, name },
            None => context! { role, content },
        })
    });
    values.collect::<Result<Vec<_>, _>>().map(Value::from_iter)
}

fn kwargs(json: &str) -> Result<Value, RpcError> {
    const PARAM: &str = "chat_template_kwargs";
    if json.is_empty() {
        return Ok(context! {});
    }
    if json.len() > MAX_KWARGS_BYTES {
        let message = format!(
            "chat_template_kwargs has {} bytes, at most {MAX_KWARGS_BYTES} are allowed.",
            json.len()
        );
        return Err(RpcError::invalid(PARAM, message));
    }
    let parsed: serde_json::Map<String, serde_json::Value> = serde_json::from_str(json).map_err(|error| {
        RpcError::invalid(
            PARAM,
            format!("chat_template_kwargs is not a JSON object: {error}"),
        )
    })?;
    if let Some(name) = RESERVED.into_iter().find(|&name| parsed.contains_key(name)) {
        let message = format!("chat_template_kwargs cannot replace `{name}`.");
        return Err(RpcError::invalid(PARAM, message));
    }
    Ok(Value::from_serialize(parsed))
}

/// `{% generation %}` marks what to train on; it is Hugging Face's own and renders its body.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let sign = tag.starts_with(['-', '+']).into();
        let body = &tag[sign..];
        let name = body.trim_start();
        let indent = body.len() - name.len();
        let replaced = [("endgeneration", "endif"), ("generation", "if true")]
            .into_iter()
            .find_map(|(name_in, name_out)| {
                let tail = name.strip_prefix(name_in)?;
                tail.trim_start()
                    .trim_start_matches(['-', '+'])
                    .starts_with("%}")
                    .then_some((tail, name_out))
            });
        match replaced {
            Some((tail, name_out)) => {
                out.push_str(&tag[..sign + indent]);
                out.push_str(name_out);
                rest = tail;
            }
            None => rest = tag,
        }
    }
    out.push_str(rest);
    out
}

/// What a client may read of a template's error: the innermost message, without the template's source.
fn describe(error: &minijinja::Error) -> String {
    if error.kind() == JinjaError::OutOfFuel {
        return "the chat template took too long to render this conversation".to_owned();
    }
    match (error.detail(), error.line()) {
        (Some(detail), _) if functions::is_raised(error) => detail.to_owned(),
        (Some(detail), Some(line)) => format!("{} (line {line}): {detail}", error.kind()),
        (Some(detail), None) => format!("{}: {detail}", error.kind()),
        (None, _) => error.kind().to_string(),
    }
}

/// Refuses to grow beyond its limit.
struct Limited {
    bytes: Vec<u8>,
    limit: usize,
    exceeded: bool,
}

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit - self.bytes.len() {
            self.exceeded = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage {
            role: role.to_owned(),
            content: content.to_owned(),
            name: None,
        }
    }

    fn render_with(source: &str, kwargs: &str) -> Result<String, RpcError> {
        let tokens = SpecialTokens {
            bos_token: Some("<s>".into()),
            ..SpecialTokens::default()
        };
        let template = ChatTemplate::new(source, &tokens).expect("compiles");
        template.render(&Conversation {
            messages: &[message("user", " Hi <b> "), message("assistant", "Yo")],
            add_generation_prompt: true,
            template_kwargs_json: kwargs,
            max_bytes: 1000,
        })
    }

    #[test]
    fn python_idioms_of_published_templates_work() {
        let source = "{{ bos_token }}{% for m in messages %}\n\
            {%- if m['role'].upper() == 'USER' %}U:{{ m.content.strip() }}{% elif m.role.startswith('a') %}|{{ m['content'] | trim }}{% endif %}\n\
            {% endfor %}{% if tools is not none %}T{% endif %}{{ messages | tojson }}";
        assert_eq!(
            render_with(source, "").expect("renders"),
            r#"<s>U:Hi <b>|Yo[{"role": "user", "content": " Hi <b> "}, {"role": "assistant", "content": "Yo"}]"#
        );
    }

    #[test]
    fn generation_tags_render_their_body() {
        let source = "{%- generation -%} a {%- endgeneration %}{% if true %}b{% endif %}{% set generation = 'c' %}{{ generation }}";
        assert_eq!(render_with(source, "").expect("renders"), "abc");
    }

    #[test]
    fn the_templates_own_refusal_reaches_the_client() {
        let error = render_with("{{ raise_exception('Roles must alternate') }}", "").expect_err("refused");
        assert_eq!(
            (error.kind, error.message.as_str()),
            (ErrorKind::InvalidArgument, "Roles must alternate")
        );
    }

    #[test]
    fn endless_and_oversized_renderings_end() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(
            render_with(endless, "")
                .expect_err("out of fuel")
                .message
                .contains("too long")
        );
        let large = "{% for a in range(9999) %}xxxx{% endfor %}";
        assert_eq!(
            render_with(large, "").expect_err("too large").kind,
            ErrorKind::ContextLengthExceeded
        );
    }

    #[test]
    fn kwargs_add_variables_but_replace_none() {
        assert_eq!(
            render_with("{{ x.y[1] }}", r#"{"x": {"y": [1, 2]}}"#).expect("renders"),
            "2"
        );
        let large = format!(r#"{{"x": "{}"}}"#, "x".repeat(MAX_KWARGS_BYTES));
        for bad in ["[]", "{", r#"{"messages": []}"#, r#"{"bos_token": ""}"#, &large] {
            let error = render_with("", bad).expect_err("refused");
            assert_eq!(error.param.as_deref(), Some("chat_template_kwargs"), "{bad}");
        }
    }

    #[test]
    fn empty_conversations_and_roles_are_refused() {
        let template = ChatTemplate::new("", &SpecialTokens::default()).expect("compiles");
        let render = |messages: &[ChatMessage]| {
            let conversation = Conversation {
                messages,
                add_generation_prompt: true,
                template_kwargs_json: "",
                max_bytes: 10,
            };
            template.render(&conversation).expect_err("refused").param
        };
        assert_eq!(render(&[]).as_deref(), Some("messages"));
        let messages = [message("user", "a"), message("", "b")];
        assert_eq!(render(&messages).as_deref(), Some("messages[1].role"));
        let many = vec![message("user", "a"); MAX_MESSAGES + 1];
        assert_eq!(render(&many).as_deref(), Some("messages"));
    }

    #[test]
    fn broken_templates_are_refused_at_load() {
        let error = ChatTemplate::new("{% for %}", &SpecialTokens::default()).expect_err("syntax error");
        assert!(error.to_string().starts_with("chat template: syntax error"));
    }
}

//! Chat templates: a conversation becomes the prompt the model was trained on.
//!
//! Templates are Jinja as Hugging Face's `apply_chat_template` runs it: blocks trimmed, Python's string and dictionary
//! methods, `raise_exception`, `strftime_now`, and a `tojson` that spells JSON like Python.

mod format;
mod functions;
mod messages;
mod request;

use std::io;

use minijinja::{Environment, ErrorKind as JinjaError, Value, context};
use phalanx_proto::{ErrorKind, RpcError, v1::ChatMessage};

pub use format::ContentFormat;
pub(super) use messages::message_bytes;
pub use request::{ChatOptions, MAX_KWARGS_BYTES};
pub(super) use request::{ChatSide, Rendered};

use super::{TextError, tokenizer::SpecialTokens};

/// Most bytes of a template's source.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// Template instructions per rendering: about a second of work.
const FUEL: u64 = 10_000_000;
const NAME: &str = "chat_template";
/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: Value,
    /// Contents are shown as lists of parts.
    wants_parts: bool,
}

/// What one rendering depends on.
pub struct Conversation<'a> {
    pub messages: &'a [ChatMessage],
    pub add_generation_prompt: bool,
    /// The prompt ends where the last message's content does.
    pub continue_final_message: bool,
    /// More variables: a map.
    pub variables: Value,
    /// Most bytes of the rendered prompt.
    pub max_bytes: usize,
}

impl ChatTemplate {
    /// Compiles `source`. Errors: it is too long or not Jinja.
    pub fn new(source: &str, tokens: &SpecialTokens, format: ContentFormat) -> Result<Self, TextError> {
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
            wants_parts: format.wants_parts(source),
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
        let shape = messages::Shape {
            parts: self.wants_parts,
            cut: conversation.continue_final_message,
        };
        let messages = messages::to_value(conversation.messages, shape)?;
        let extra = context! { ..conversation.variables.clone(), ..self.tokens.clone() };
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
        let prompt = String::from_utf8(prompt.bytes)
            .map_err(|_| RpcError::new(ErrorKind::Internal, "the chat template rendered invalid UTF-8"))?;
        if conversation.continue_final_message {
            return messages::cut(prompt);
        }
        Ok(prompt)
    }
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
    use phalanx_proto::limits::MAX_MESSAGES;

    use super::*;

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage {
            role: role.to_owned(),
            content: content.to_owned(),
            ..ChatMessage::default()
        }
    }

    fn render_with(source: &str) -> Result<String, RpcError> {
        render(source, ContentFormat::Auto, false)
    }

    fn render(source: &str, format: ContentFormat, open: bool) -> Result<String, RpcError> {
        let tokens = SpecialTokens {
            bos_token: Some("<s>".into()),
            ..SpecialTokens::default()
        };
        let template = ChatTemplate::new(source, &tokens, format).expect("compiles");
        template.render(&Conversation {
            messages: &[message("user", " Hi <b> "), message("assistant", "Yo ")],
            add_generation_prompt: !open,
            continue_final_message: open,
            variables: context! {},
            max_bytes: 1000,
        })
    }

    #[test]
    fn python_idioms_of_published_templates_work() {
        let source = "{{ bos_token }}{% for m in messages %}\n\
            {%- if m['role'].upper() == 'USER' %}U:{{ m.content.strip() }}{% elif m.role.startswith('a') %}|{{ m['content'] | trim }}{% endif %}\n\
            {% endfor %}{% if tools is not none %}T{% endif %}{{ messages | tojson }}";
        assert_eq!(
            render_with(source).expect("renders"),
            r#"<s>U:Hi <b>|Yo[{"role": "user", "content": " Hi <b> "}, {"role": "assistant", "content": "Yo "}]"#
        );
    }

    #[test]
    fn constants_are_pythons() {
        assert_eq!(
            render_with("{{ true }} {{ false }} {{ none }} {{ missing }}{{ 1.0 }}").expect("renders"),
            "True False None 1.0"
        );
    }

    #[test]
    fn generation_tags_render_their_body() {
        let source = "{%- generation -%} a {%- endgeneration %}{% if true %}b{% endif %}{% set generation = 'c' %}{{ generation }}";
        assert_eq!(render_with(source).expect("renders"), "abc");
    }

    #[test]
    fn the_templates_own_refusal_reaches_the_client() {
        let error = render_with("{{ raise_exception('Roles must alternate') }}").expect_err("refused");
        assert_eq!(
            (error.kind, error.message.as_str()),
            (ErrorKind::InvalidArgument, "Roles must alternate")
        );
    }

    #[test]
    fn endless_and_oversized_renderings_end() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(
            render_with(endless)
                .expect_err("out of fuel")
                .message
                .contains("too long")
        );
        let large = "{% for a in range(9999) %}xxxx{% endfor %}";
        assert_eq!(
            render_with(large).expect_err("too large").kind,
            ErrorKind::ContextLengthExceeded
        );
    }

    #[test]
    fn contents_are_parts_for_templates_that_want_them() {
        let source = "{% for m in messages %}{% for part in m.content %}{{ part.type }}:{{ part.text }};{% endfor %}{% endfor %}";
        assert_eq!(render_with(source).expect("renders"), "text: Hi <b> ;text:Yo ;");
        let source = "{{ messages[0].content is string }}";
        assert_eq!(
            render(source, ContentFormat::OpenAi, false).expect("renders"),
            "False"
        );
    }

    #[test]
    fn an_open_message_ends_the_prompt() {
        let open = |source| render(source, ContentFormat::Auto, true);
        let plain = "{% for m in messages %}[{{ m.content }}]{% endfor %}end";
        assert_eq!(open(plain).expect("renders"), "[ Hi <b> ][Yo ");
        // What the template trims is trimmed.
        let trimmed = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}end";
        assert_eq!(open(trimmed).expect("renders"), "[Hi <b>][Yo");
        let parts =
            "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}|{% endfor %}";
        assert_eq!(open(parts).expect("renders"), " Hi <b> |Yo ");
        let error = open("{{ messages[0].content }}").expect_err("not shown");
        assert_eq!(error.param.as_deref(), Some("continue_final_message"));
    }

    #[test]
    fn empty_conversations_and_roles_are_refused() {
        let template =
            ChatTemplate::new("", &SpecialTokens::default(), ContentFormat::Auto).expect("compiles");
        let render = |messages: &[ChatMessage]| {
            let conversation = Conversation {
                messages,
                add_generation_prompt: true,
                continue_final_message: false,
                variables: context! {},
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
        let error = ChatTemplate::new("{% for %}", &SpecialTokens::default(), ContentFormat::Auto)
            .expect_err("syntax error");
        assert!(error.to_string().starts_with("chat template: syntax error"));
    }
}

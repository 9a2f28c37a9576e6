//! A chat request, from its messages to the prompt, and to what its completions will mean.

use std::sync::Arc;

use minijinja::{Value, context};
use phalanx_proto::{
    RpcError,
    v1::{self, structured_outputs::Constraint},
};

use super::{ChatTemplate, ContentFormat, Conversation, messages};
use crate::text::{
    OutputPlan, ReasoningParser, TextError, TokenTable, Tokenizer, ToolParser,
    json::Json,
    output::{ReasoningPlan, ToolPlan},
    tokenizer::SpecialTokens,
    tools::{ToolChoice, ToolSet},
};

/// Most bytes of `template_kwargs_json`.
pub const MAX_KWARGS_BYTES: usize = 64 << 10;
/// Most bytes of `documents_json`.
const MAX_DOCUMENTS_BYTES: usize = 4 << 20;
/// Most bytes of a template that comes with a request.
const MAX_REQUEST_TEMPLATE_BYTES: usize = 64 << 10;
/// Variables a request cannot replace through `template_kwargs_json`.
const RESERVED: [&str; 8] = [
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
];

/// How a server treats conversations.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    pub content_format: ContentFormat,
    /// Requests may bring templates of their own.
    pub trust_request_template: bool,
    /// How the model writes the calls that it makes of its own will; none: such calls are not offered.
    pub tool_parser: Option<ToolParser>,
    pub reasoning_parser: Option<ReasoningParser>,
    /// Tools that must not be called are not shown either.
    pub exclude_tools_when_none: bool,
    /// Template variables of requests that do not set them: a JSON object, or empty.
    pub default_template_kwargs: String,
}

/// What conversations need of a model and its server.
#[derive(Debug)]
pub(crate) struct ChatSide {
    template: Option<ChatTemplate>,
    /// In its place where there are tools.
    tool_template: Option<ChatTemplate>,
    special: SpecialTokens,
    options: ChatOptions,
    default_kwargs: Vec<(String, Json)>,
    /// Ids of the parsers' tokens.
    markers: Arc<[u32]>,
    table: Arc<TokenTable>,
}

/// A conversation ready to be tokenized.
#[derive(Debug)]
pub(crate) struct Rendered {
    pub(crate) prompt: String,
    /// The last message's text, if it comes first in the output.
    pub(crate) echo: Option<String>,
    pub(crate) plan: OutputPlan,
    /// What the tools leave of all that the completions may say.
    pub(crate) constraint: Option<Constraint>,
}

impl ChatSide {
    /// A side with a template, and one of its own for conversations with tools. Errors: one of them does not compile,
    /// the default variables are no JSON object.
    pub(crate) fn new(
        (template, tool_template): (Option<&str>, Option<&str>),
        tokenizer: &Tokenizer,
        options: ChatOptions,
    ) -> Result<Self, TextError> {
        let special = tokenizer.special_tokens().clone();
        let compile = |source: Option<&str>| {
            source
                .map(|source| ChatTemplate::new(source, &special, options.content_format))
                .transpose()
        };
        let (template, tool_template) = (compile(template)?, compile(tool_template)?);
        let default_kwargs = kwargs(&options.default_template_kwargs)
            .map_err(|error| TextError::file("--default-chat-template-kwargs", error.message))?;
        let tools = options.tool_parser.map_or(&[][..], ToolParser::markers);
        let reasoning = options
            .reasoning_parser
            .map_or(&[][..], |_| ReasoningParser::MARKERS);
        let markers = tools.iter().chain(reasoning);
        let mut markers: Vec<u32> = markers.filter_map(|tag| tokenizer.token_id(tag)).collect();
        markers.sort_unstable();
        Ok(Self {
            template,
            tool_template,
            special,
            options,
            default_kwargs,
            markers: markers.into(),
            table: Arc::clone(tokenizer.table()),
        })
    }

    /// Whether any conversation can be rendered.
    pub(crate) fn check_template(&self, request: &v1::ChatRequest) -> Result<(), RpcError> {
        if self.template.is_some() || !request.chat_template.is_empty() {
            return Ok(());
        }
        let message = "the model has no chat template, and there is no default one; start the server with \
                       --chat-template, or use completions";
        Err(RpcError::invalid("messages", message))
    }

    /// Renders `request` in at most `max_bytes`. Errors name the field at fault.
    pub(crate) fn render(&self, request: &v1::ChatRequest, max_bytes: usize) -> Result<Rendered, RpcError> {
        let opens_turn = opens_turn(request)?;
        let own = self.own_template(&request.chat_template)?;
        self.check_template(request)?;
        let tools = ToolSet::parse(&request.tools_json)?;
        let choice = self.choice(&tools, request)?;
        let mut variables = self.default_kwargs.clone();
        variables.extend(kwargs(&request.template_kwargs_json)?);
        let documents = documents(&request.documents_json)?;
        let shows_tools = choice != ToolChoice::None || !self.options.exclude_tools_when_none;
        let given = given(request, shows_tools.then(|| tools.to_value()), documents);
        let variables = Json::Object(variables);
        let thinks = variables.get("enable_thinking") != Some(&Json::Bool(false));
        let kwargs = variables.to_value();
        let conversation = Conversation {
            messages: &request.messages,
            add_generation_prompt: opens_turn,
            continue_final_message: request.continue_final_message,
            // Kwargs win, as with vLLM.
            variables: context! { ..kwargs, ..given },
            max_bytes,
        };
        let with_tools = self
            .tool_template
            .as_ref()
            .filter(|_| shows_tools && !tools.is_empty());
        let template = own.as_ref().or(with_tools).or(self.template.as_ref());
        let prompt = template.map_or(Ok(String::new()), |template| template.render(&conversation))?;
        let parallel = request.parallel_tool_calls.unwrap_or(true);
        let constraint = self.constraint(&tools, &choice, parallel)?;
        let plan = self.plan(&prompt, thinks, request, (tools, choice));
        let echoes = request.output.is_some_and(|output| output.echo);
        Ok(Rendered {
            prompt,
            echo: if echoes { echoed(request, opens_turn) } else { None },
            plan,
            constraint,
        })
    }

    fn own_template(&self, source: &str) -> Result<Option<ChatTemplate>, RpcError> {
        const PARAM: &str = "chat_template";
        if source.is_empty() {
            return Ok(None);
        }
        if !self.options.trust_request_template {
            let message = "Chat template is passed with request, but --trust-request-chat-template is not set. Refused \
                           request with untrusted chat template.";
            return Err(RpcError::invalid(PARAM, message));
        }
        if source.len() > MAX_REQUEST_TEMPLATE_BYTES {
            let message = format!(
                "chat_template has {} bytes, at most {MAX_REQUEST_TEMPLATE_BYTES} are allowed.",
                source.len()
            );
            return Err(RpcError::invalid(PARAM, message));
        }
        let template = ChatTemplate::new(source, &self.special, self.options.content_format);
        template
            .map(Some)
            .map_err(|error| RpcError::invalid(PARAM, error.to_string()))
    }

    fn choice(&self, tools: &ToolSet, request: &v1::ChatRequest) -> Result<ToolChoice, RpcError> {
        let choice = tools.choice(request.tool_choice.as_ref())?;
        match &choice {
            ToolChoice::Auto if self.options.tool_parser.is_none() => {
                let message = "\"auto\" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set";
                Err(RpcError::invalid("tool_choice", message))
            }
            _ => Ok(choice),
        }
    }

    /// A schema for calls that must be made; for those of the model's own will a grammar of the texts that hold them, if one
    /// may only be made as its schema says.
    fn constraint(
        &self,
        tools: &ToolSet,
        choice: &ToolChoice,
        parallel: bool,
    ) -> Result<Option<Constraint>, RpcError> {
        if *choice == ToolChoice::Auto {
            let parser = self.options.tool_parser;
            let strict = parser.map(|parser| parser.constraint(tools, parallel, &self.table));
            return Ok(strict.transpose()?.flatten());
        }
        let schema = tools.constraint(choice, parallel)?;
        Ok(schema.map(|schema| Constraint::JsonSchema(schema.to_string())))
    }

    /// How completions of `prompt` are taken apart.
    fn plan(
        &self,
        prompt: &str,
        thinks: bool,
        request: &v1::ChatRequest,
        (tools, choice): (ToolSet, ToolChoice),
    ) -> OutputPlan {
        let is_forced = matches!(choice, ToolChoice::Required | ToolChoice::Named(_));
        let reasoning = self.options.reasoning_parser.map(|parser| ReasoningPlan {
            parser,
            // A model that must call does not think aloud: its text is JSON from the first character.
            begins: !is_forced && parser.begins_with_reasoning(prompt, thinks),
            include: request.include_reasoning.unwrap_or(true),
        });
        let calls = (choice != ToolChoice::None).then(|| ToolPlan {
            parser: self.options.tool_parser,
            choice,
            tools: Arc::new(tools),
            parallel: request.parallel_tool_calls.unwrap_or(true),
        });
        OutputPlan {
            markers: if calls.is_some() || reasoning.is_some() {
                self.markers.clone()
            } else {
                Arc::default()
            },
            reasoning,
            tools: calls,
        }
    }
}

/// Whether the template opens the assistant's turn.
fn opens_turn(request: &v1::ChatRequest) -> Result<bool, RpcError> {
    if !request.continue_final_message {
        return Ok(request.add_generation_prompt.unwrap_or(true));
    }
    if request.add_generation_prompt == Some(true) {
        let message = "Cannot set both `continue_final_message` and `add_generation_prompt` to True.";
        return Err(RpcError::invalid("continue_final_message", message));
    }
    Ok(false)
}

/// The variables that have fields of their own. Those that are not given must be absent, not `None`.
fn given(request: &v1::ChatRequest, tools: Option<Value>, documents: Option<Value>) -> Value {
    let mut given = context! {};
    if let Some(tools) = tools {
        given = context! { tools, ..given };
    }
    if let Some(documents) = documents {
        given = context! { documents, ..given };
    }
    if !request.reasoning_effort.is_empty() {
        given = context! { reasoning_effort => request.reasoning_effort, ..given };
    }
    given
}

/// The content of the last message, if the completion is by the same role and so continues it.
fn echoed(request: &v1::ChatRequest, opens_turn: bool) -> Option<String> {
    let last = request.messages.last()?;
    (!opens_turn || last.role == "assistant").then(|| messages::text(last))
}

fn kwargs(json: &str) -> Result<Vec<(String, Json)>, RpcError> {
    const PARAM: &str = "chat_template_kwargs";
    if json.is_empty() {
        return Ok(Vec::new());
    }
    if json.len() > MAX_KWARGS_BYTES {
        let message = format!(
            "chat_template_kwargs has {} bytes, at most {MAX_KWARGS_BYTES} are allowed.",
            json.len()
        );
        return Err(RpcError::invalid(PARAM, message));
    }
    let refuse =
        |why: String| RpcError::invalid(PARAM, format!("chat_template_kwargs is not a JSON object: {why}"));
    let parsed = serde_json::from_str(json).map_err(|error| refuse(error.to_string()))?;
    let Json::Object(entries) = parsed else {
        return Err(refuse("it is something else".to_owned()));
    };
    let is_reserved = |name: &&str| entries.iter().any(|(key, _)| key == name);
    if let Some(name) = RESERVED.into_iter().find(is_reserved) {
        let message = format!("chat_template_kwargs cannot replace `{name}`.");
        return Err(RpcError::invalid(PARAM, message));
    }
    Ok(entries)
}

fn documents(json: &str) -> Result<Option<Value>, RpcError> {
    const PARAM: &str = "documents";
    if json.is_empty() {
        return Ok(None);
    }
    if json.len() > MAX_DOCUMENTS_BYTES {
        let message = format!(
            "documents has {} bytes, at most {MAX_DOCUMENTS_BYTES} are allowed.",
            json.len()
        );
        return Err(RpcError::invalid(PARAM, message));
    }
    let documents: Json = serde_json::from_str(json)
        .map_err(|error| RpcError::invalid(PARAM, format!("documents is not valid JSON: {error}")))?;
    let items = documents
        .as_array()
        .ok_or_else(|| RpcError::invalid(PARAM, "documents must be a list of objects."))?;
    if let Some(at) = items.iter().position(|item| !item.is_object()) {
        let param = format!("documents[{at}]");
        let message = format!("{param} must be an object.");
        return Err(RpcError::invalid(param, message));
    }
    Ok((!items.is_empty()).then(|| documents.to_value()))
}

//! What the document says of each operation.

use serde_json::{Map, Value, json};

use super::{
    Field, Schema, fields,
    schemas::{self, property},
};
use crate::{
    anthropic::{CountBody, MessagesBody},
    auth::Access,
    control::AbortBody,
    inference::{GenerateBody, SamplingFields},
    openai::{
        chat::ChatFields, completions::CompletionFields, output::OutputFields, params::Params,
        structured::StructuredFields,
    },
    responses::ResponsesFields,
    routes::Route,
    tgi,
    tokenizer::{DetokenizeBody, TokenizeBody},
};

/// One method of one path.
pub(crate) struct Operation {
    summary: &'static str,
    tag: &'static str,
    /// The objects it reads; the first is the body.
    pub(super) schemas: Vec<Schema>,
    body_is_optional: bool,
    query: &'static [Field],
    /// Content types of a good reply.
    replies: &'static [&'static str],
    error: &'static str,
}

const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";

impl Operation {
    fn new(tag: &'static str, summary: &'static str) -> Self {
        Self {
            summary,
            tag,
            schemas: Vec::new(),
            body_is_optional: false,
            query: &[],
            replies: &[JSON],
            error: "Error",
        }
    }

    fn reads(mut self, schema: Schema) -> Self {
        self.schemas.push(schema);
        self
    }

    fn replies(mut self, replies: &'static [&'static str]) -> Self {
        self.replies = replies;
        self
    }

    fn query(mut self, query: &'static [Field]) -> Self {
        self.query = query;
        self
    }

    /// The operation object of OpenAPI 3.1.
    pub(super) fn json(&self, method: &str, route: &Route) -> Value {
        let name: String = route
            .path
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
            .collect();
        let mut operation = Map::new();
        let mut set = |key: &str, value: Value| operation.insert(key.to_owned(), value);
        set("operationId", format!("{method}{name}").into());
        set("summary", self.summary.into());
        set("tags", json!([self.tag]));
        set("security", security(route.access));
        let parameters = parameters(route.path, self.query);
        if !parameters.is_empty() {
            set("parameters", parameters.into());
        }
        if let Some(body) = self.schemas.first() {
            let content = json!({JSON: {"schema": reference(body.name)}});
            set(
                "requestBody",
                json!({"required": !self.body_is_optional, "content": content}),
            );
        }
        let content: Map<String, Value> = self.replies.iter().map(|kind| content_of(kind)).collect();
        set(
            "responses",
            json!({
                "200": {"description": "The answer.", "content": content},
                "default": {
                    "description": "A refusal or a failure.",
                    "content": {JSON: {"schema": reference(self.error)}},
                },
            }),
        );
        operation.into()
    }
}

/// What is in the path in braces, and in the query.
fn parameters(path: &str, query: &[Field]) -> Vec<Value> {
    let in_path = path
        .split(['{', '}'])
        .skip(1)
        .step_by(2)
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}));
    let in_query = query.iter().map(property).map(|(name, schema)| {
        json!({"name": name, "in": "query", "description": schema["description"], "schema": schema})
    });
    in_path.chain(in_query).collect()
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn content_of(kind: &str) -> (String, Value) {
    let schema = if kind == JSON {
        json!({})
    } else {
        json!({"type": "string"})
    };
    (kind.to_owned(), json!({"schema": schema}))
}

/// Without API keys, clients need none.
fn security(access: Access) -> Value {
    match access {
        Access::Open => json!([]),
        Access::Client => json!([{}, {"bearer": []}]),
        Access::Admin => json!([{"bearer": []}]),
    }
}

pub(crate) fn chat() -> Operation {
    Operation::new("OpenAI", "Answers a conversation.")
        .reads(Schema {
            name: "ChatCompletionRequest",
            accepted: || {
                [
                    fields::of::<Params>(),
                    fields::of::<OutputFields>(),
                    fields::of::<ChatFields>(),
                    fields::of::<StructuredFields>(),
                ]
                .concat()
            },
            required: &["messages"],
            tables: &[
                schemas::CHAT,
                schemas::TEXT_OPTIONS,
                schemas::OUTPUT,
                schemas::LISTED,
                schemas::CHOICES,
                schemas::SAMPLING,
                schemas::STRUCTURED,
                schemas::PLACE,
                schemas::USER,
            ],
        })
        .replies(&[JSON, EVENTS])
}

pub(crate) fn completions() -> Operation {
    Operation::new("OpenAI", "Completes prompts.")
        .reads(Schema {
            name: "CompletionRequest",
            accepted: || {
                [
                    fields::of::<Params>(),
                    fields::of::<OutputFields>(),
                    fields::of::<CompletionFields>(),
                    fields::of::<StructuredFields>(),
                ]
                .concat()
            },
            required: &["prompt"],
            tables: &[
                schemas::PROMPT,
                schemas::TEXT_OPTIONS,
                schemas::OUTPUT,
                schemas::LISTED,
                schemas::COMPLETIONS,
                schemas::CHOICES,
                schemas::SAMPLING,
                schemas::STRUCTURED,
                schemas::PLACE,
                schemas::USER,
            ],
        })
        .replies(&[JSON, EVENTS])
}

pub(crate) fn models() -> Operation {
    Operation::new("OpenAI", "The served model names.")
}

pub(crate) fn responses() -> Operation {
    Operation::new("OpenAI", "Answers a conversation with items.")
        .reads(Schema {
            name: "CreateResponse",
            accepted: || {
                let mut names = [
                    fields::of::<Params>(),
                    fields::of::<StructuredFields>(),
                    fields::of::<ResponsesFields>(),
                ]
                .concat();
                // Read only to be refused.
                names.retain(|name| *name != "n");
                names
            },
            required: &["input"],
            tables: &[
                schemas::RESPONSES,
                schemas::SAMPLING,
                schemas::STRUCTURED,
                schemas::PLACE,
                schemas::USER,
            ],
        })
        .replies(&[JSON, EVENTS])
}

pub(crate) fn response() -> Operation {
    Operation::new("OpenAI", "A response that is stored.")
        .query(schemas::RESPONSE)
        .replies(&[JSON, EVENTS])
}

pub(crate) fn cancel_response() -> Operation {
    Operation::new("OpenAI", "Ends a response that is made in the background.")
}

pub(crate) fn messages() -> Operation {
    let operation = Operation::new("Anthropic", "Answers a conversation.")
        .reads(Schema {
            name: "MessagesRequest",
            accepted: || [fields::of::<CountBody>(), fields::of::<MessagesBody>()].concat(),
            required: &["model", "messages", "max_tokens"],
            tables: &[schemas::CONVERSATION, schemas::MESSAGES_API],
        })
        .replies(&[JSON, EVENTS]);
    Operation {
        error: "AnthropicError",
        ..operation
    }
}

pub(crate) fn count_tokens() -> Operation {
    let operation = Operation::new("Anthropic", "How many tokens a conversation has.").reads(Schema {
        name: "CountTokensRequest",
        accepted: fields::of::<CountBody>,
        required: &["model", "messages"],
        tables: &[schemas::CONVERSATION],
    });
    Operation {
        error: "AnthropicError",
        ..operation
    }
}

pub(crate) fn tokenize() -> Operation {
    Operation::new("Tokenizer", "The tokens of a text or of a conversation.").reads(Schema {
        name: "TokenizeRequest",
        accepted: fields::of::<TokenizeBody>,
        required: &[],
        tables: &[schemas::TOKENIZE],
    })
}

pub(crate) fn detokenize() -> Operation {
    Operation::new("Tokenizer", "The text of tokens.").reads(Schema {
        name: "DetokenizeRequest",
        accepted: fields::of::<DetokenizeBody>,
        required: &["tokens"],
        tables: &[schemas::DETOKENIZE],
    })
}

pub(crate) fn tokenizer_info() -> Operation {
    Operation::new("Tokenizer", "The model's tokenizer configuration.")
}

/// Of [`Params`], what this route reads outside of `sampling_params`.
fn place() -> Vec<&'static str> {
    schemas::PLACE.iter().map(|(name, ..)| *name).collect()
}

pub(crate) fn generate_tokens() -> Operation {
    Operation::new("Tokens", "Completes token ids with token ids.")
        .reads(Schema {
            name: "GenerateRequest",
            accepted: || [fields::of::<GenerateBody>(), place()].concat(),
            required: &["token_ids", "sampling_params"],
            tables: &[schemas::GENERATE, schemas::PLACE],
        })
        .reads(Schema {
            name: "SamplingParams",
            accepted: || {
                let place = place();
                let own = [fields::of::<SamplingFields>(), fields::of::<StructuredFields>()].concat();
                let mut names = [fields::of::<Params>(), own].concat();
                names.retain(|name| !place.contains(name) && *name != "user");
                names
            },
            required: &[],
            tables: &[
                schemas::COMPLETIONS,
                schemas::LISTED,
                schemas::CHOICES,
                schemas::SAMPLING,
                schemas::STRUCTURED,
            ],
        })
        .replies(&[JSON, EVENTS])
}

const ABORT: Schema = Schema {
    name: "AbortRequest",
    accepted: fields::of::<AbortBody>,
    required: &[],
    tables: &[schemas::ABORT],
};

pub(crate) fn abort() -> Operation {
    Operation::new("Tokens", "Ends requests by their ids.").reads(Schema {
        name: "AbortRequestsByIds",
        required: &["request_ids"],
        ..ABORT
    })
}

pub(crate) fn invocations() -> Operation {
    let union = Operation::new(
        "SageMaker",
        "A chat if there are messages, a completion if there is a prompt.",
    );
    Operation {
        schemas: vec![INVOCATION],
        ..union.replies(&[JSON, EVENTS])
    }
}

/// The fields of both kinds.
const INVOCATION: Schema = Schema {
    name: "Invocation",
    accepted: || {
        let mut names = [
            fields::of::<Params>(),
            fields::of::<OutputFields>(),
            fields::of::<StructuredFields>(),
            fields::of::<ChatFields>(),
            fields::of::<CompletionFields>(),
        ]
        .concat();
        // Two have a meaning in both, of which the chat's is documented.
        names.sort_unstable();
        names.dedup();
        names
    },
    required: &[],
    tables: &[
        schemas::CHAT,
        schemas::PROMPT,
        schemas::TEXT_OPTIONS,
        schemas::OUTPUT,
        schemas::LISTED,
        schemas::CHOICES,
        schemas::SAMPLING,
        schemas::STRUCTURED,
        schemas::PLACE,
        schemas::USER,
    ],
};

fn tgi(summary: &'static str, replies: &'static [&'static str]) -> Operation {
    let operation = Operation::new("Text Generation Inference", summary)
        .reads(Schema {
            name: "TgiRequest",
            accepted: fields::of::<tgi::GenerateBody>,
            required: &["inputs"],
            tables: &[schemas::TGI],
        })
        .reads(Schema {
            name: "TgiParameters",
            accepted: fields::of::<tgi::Parameters>,
            required: &[],
            tables: &[schemas::TGI_PARAMETERS],
        })
        .replies(replies);
    Operation {
        error: "TgiError",
        ..operation
    }
}

pub(crate) fn tgi_root() -> Operation {
    tgi(
        "Completes a prompt, as a list of one answer or as a stream.",
        &[JSON, EVENTS],
    )
}

pub(crate) fn tgi_generate() -> Operation {
    tgi("Completes a prompt.", &[JSON])
}

pub(crate) fn tgi_generate_stream() -> Operation {
    tgi("Completes a prompt token by token.", &[EVENTS])
}

pub(crate) fn tgi_info() -> Operation {
    Operation::new("Text Generation Inference", "The model and its limits.")
}

pub(crate) fn health() -> Operation {
    Operation::new(
        "Operation",
        "Whether requests are served: 200 or 503, with the state of every rank.",
    )
}

pub(crate) fn metrics() -> Operation {
    Operation::new("Operation", "Metrics of gateway and coordinator.")
        .replies(&["text/plain", "application/openmetrics-text"])
}

pub(crate) fn version() -> Operation {
    Operation::new("Operation", "This server's version.")
}

pub(crate) fn load() -> Operation {
    Operation::new("Operation", "How many requests this gateway has running.")
}

pub(crate) fn server_info() -> Operation {
    Operation::new("Operation", "What the server was started with.").query(schemas::SERVER_INFO)
}

pub(crate) fn pause() -> Operation {
    Operation::new("Control", "Starts nothing new until resumed.").query(schemas::PAUSE)
}

pub(crate) fn resume() -> Operation {
    Operation::new("Control", "Ends a pause.")
}

pub(crate) fn is_paused() -> Operation {
    Operation::new("Control", "Whether the engine is paused.")
}

pub(crate) fn abort_all() -> Operation {
    let operation = Operation::new("Control", "Ends the requests named, or all.").reads(ABORT);
    Operation {
        body_is_optional: true,
        ..operation
    }
}

pub(crate) fn reset() -> Operation {
    Operation::new("Control", "Nothing computed so far is found by later requests.").query(schemas::RESET)
}

pub(crate) fn openapi() -> Operation {
    Operation::new("Documentation", "This document.")
}

pub(crate) fn page() -> Operation {
    Operation::new("Documentation", "This document as a page.").replies(&["text/html"])
}

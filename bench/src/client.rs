//! One streamed request.

use std::time::{Duration, Instant};

use http::{Method, Request};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;

use crate::{endpoint::Endpoint, sse::Events};

/// Of the body of an error.
const MAX_ERROR_BYTES: usize = 16 << 10;

/// How a request went.
pub type Outcome = Result<Sample, Failure>;

/// What a client saw of one answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// From the start of the request to each event that carries a choice.
    pub events: Vec<Duration>,
    /// As the server counts them.
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub cached_tokens: u64,
}

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error("connection: {0}")]
    Connection(String),
    #[error("status {status}: {message}")]
    Status { status: u16, message: String },
    #[error("stream: {0}")]
    Stream(String),
    #[error("no end within {0:?}")]
    Timeout(Duration),
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<serde::de::IgnoredAny>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    prompt_tokens_details: Option<PromptTokensDetails>,
}

#[derive(Deserialize)]
struct PromptTokensDetails {
    cached_tokens: Option<u64>,
}

impl Sample {
    pub fn time_to_first_token(&self) -> Duration {
        self.events.first().copied().unwrap_or_default()
    }

    pub fn end_to_end_latency(&self) -> Duration {
        self.events.last().copied().unwrap_or_default()
    }

    /// From each event to the next.
    pub fn inter_token_latencies(&self) -> impl Iterator<Item = Duration> {
        self.events.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// The time after the first token for each further one; `None` if there is none.
    pub fn time_per_output_token(&self) -> Option<Duration> {
        let further = u32::try_from(self.completion_tokens.checked_sub(1)?).ok()?;
        (self.end_to_end_latency() - self.time_to_first_token()).checked_div(further)
    }
}

/// Posts `body` and reads the stream to its end, on a connection of its own.
pub(crate) async fn stream(endpoint: &Endpoint, route: &str, body: Vec<u8>) -> Outcome {
    let connection = |error: &dyn std::fmt::Display| Failure::Connection(error.to_string());
    let start = Instant::now();
    let socket = TcpStream::connect(endpoint.address()).await;
    let socket = socket.map_err(|error| connection(&error))?;
    socket.set_nodelay(true).map_err(|error| connection(&error))?;
    let (mut sender, connected) = http1::handshake(TokioIo::new(socket))
        .await
        .map_err(|error| connection(&error))?;
    let driver = tokio::spawn(connected);
    let mut request = Request::new(Full::new(Bytes::from(body)));
    *request.method_mut() = Method::POST;
    let path = endpoint.path(route).parse();
    *request.uri_mut() = path.map_err(|error| connection(&error))?;
    *request.headers_mut() = endpoint.headers().clone();
    let response = sender.send_request(request).await;
    let outcome = match response {
        Ok(response) => read(response, start).await,
        Err(error) => Err(connection(&error)),
    };
    driver.abort();
    outcome
}

async fn read(response: http::Response<hyper::body::Incoming>, start: Instant) -> Outcome {
    let status = response.status();
    let mut body = response.into_body();
    if !status.is_success() {
        let text = Limited::new(body, MAX_ERROR_BYTES).collect().await;
        let text = text.map_or_else(
            |error| error.to_string().into(),
            http_body_util::Collected::to_bytes,
        );
        return Err(Failure::Status {
            status: status.as_u16(),
            message: String::from_utf8_lossy(&text).into_owned(),
        });
    }
    let failed = |error: &dyn std::fmt::Display| Failure::Stream(error.to_string());
    let mut sample = Sample {
        events: Vec::new(),
        prompt_tokens: 0,
        completion_tokens: 0,
        cached_tokens: 0,
    };
    let mut events = Events::default();
    let mut done = false;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| failed(&error))?;
        let Some(bytes) = frame.data_ref() else { continue };
        let now = start.elapsed();
        events.push(bytes).map_err(|_| failed(&"a line without end"))?;
        while let Some(data) = events.next() {
            if data == b"[DONE]" {
                done = true;
                continue;
            }
            let chunk: Chunk = serde_json::from_slice(data).map_err(|error| failed(&error))?;
            sample.take(chunk, now)?;
        }
    }
    if done && !sample.events.is_empty() {
        Ok(sample)
    } else {
        Err(failed(&"it ended before [DONE]"))
    }
}

impl Sample {
    fn take(&mut self, chunk: Chunk, now: Duration) -> Result<(), Failure> {
        if let Some(error) = chunk.error {
            return Err(Failure::Stream(error.to_string()));
        }
        if !chunk.choices.is_empty() {
            self.events.push(now);
        }
        if let Some(usage) = chunk.usage {
            self.prompt_tokens = usage.prompt_tokens;
            self.completion_tokens = usage.completion_tokens;
            let cached = usage
                .prompt_tokens_details
                .and_then(|details| details.cached_tokens);
            self.cached_tokens = cached.unwrap_or(0);
        }
        Ok(())
    }
}

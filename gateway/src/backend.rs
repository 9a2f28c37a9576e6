//! The gRPC side: two channels to one coordinator, and its statuses as errors.

use std::{error::Error, fmt, time::Duration};

use futures_util::{StreamExt, stream::BoxStream};
use phalanx_proto::{
    ErrorKind, RpcError,
    spans::TRACEPARENT,
    tls::ClientTlsFiles,
    v1::{
        AbortRequestRequest, AbortRequestsRequest, ChatRequest, DetokenizeRequest, DetokenizeResponse,
        GenerateChunk, GenerateRequest, GenerateResponse, GetMetricsRequest, GetMetricsResponse,
        GetServerInfoRequest, GetServerInfoResponse, GetStatusRequest, GetStatusResponse,
        GetTokenizerInfoRequest, GetTokenizerInfoResponse, ListModelsRequest, ListModelsResponse,
        PauseRequest, ResetPrefixCacheRequest, ResumeRequest, TokenizeRequest, TokenizeResponse,
        admin_client::AdminClient, control_client::ControlClient, inference_client::InferenceClient,
        inference_server::SERVICE_NAME, tokenizer_client::TokenizerClient,
    },
};
use tonic::{
    Code, Request, Response, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_client::HealthClient};

use crate::{
    auth::Keys,
    config::GatewayError,
    limits::{ADMIN_DEADLINE, MAX_REPLY_BYTES},
    trace,
};

/// A coordinator on the same host or network answers in microseconds; this is for one that is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A hung coordinator is noticed after one interval and one timeout.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes a stream may hold for a client that reads slowly, before the coordinator is made to wait.
const STREAM_WINDOW: u32 = 64 << 10;
/// All streams share the connection's window, so it must exceed what the slow ones can hold together: with HTTP/2's
/// usual ratio of the two, a few clients that stop reading would stop everybody.
const CONNECTION_WINDOW: u32 = 1 << 30;

/// The pieces of one prompt's completions, in order.
pub(crate) type Chunks = BoxStream<'static, Result<GenerateChunk, RpcError>>;

/// A coordinator. Connects when first needed and again whenever the connection was lost.
#[derive(Clone, Debug)]
pub(crate) struct Backend {
    inference: InferenceClient<Keyed>,
    tokenizer: TokenizerClient<Keyed>,
    /// On a connection of its own, so that probes are answered however busy the other one is.
    admin: AdminClient<Keyed>,
    control: ControlClient<Keyed>,
    /// On the connection of `admin`.
    health: HealthClient<Keyed>,
}

type Keyed = InterceptedService<Channel, Credentials>;

/// Metadata with the key of an operator.
const ADMIN_KEY: &str = "phalanx-admin-key";

/// Presents keys with every call, as the coordinator wants the same ones as the gateway, and the place in the caller's
/// trace.
#[derive(Clone, Debug, Default)]
struct Credentials {
    api_key: Option<MetadataValue<Ascii>>,
    admin_key: Option<MetadataValue<Ascii>>,
}

impl Credentials {
    fn of(keys: &Keys) -> Self {
        Self {
            api_key: keys.clients.authorization().and_then(|value| secret(&value)),
            admin_key: keys.admins.first().and_then(secret),
        }
    }
}

/// Keys without control characters fit a header.
fn secret(value: &str) -> Option<MetadataValue<Ascii>> {
    let mut value = MetadataValue::try_from(value.as_bytes()).ok()?;
    value.set_sensitive(true);
    Some(value)
}

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        for (name, key) in [("authorization", &self.api_key), (ADMIN_KEY, &self.admin_key)] {
            if let Some(value) = key {
                request.metadata_mut().insert(name, value.clone());
            }
        }
        // A context is hexadecimal digits and dashes.
        if let Some(context) = trace::caller()
            && let Ok(value) = MetadataValue::try_from(context.to_string())
        {
            request.metadata_mut().insert(TRACEPARENT, value);
        }
        Ok(request)
    }
}

impl Backend {
    /// Prepares for the coordinator at `address`, without connecting. `tls` is for `https`.
    pub(crate) fn new(
        address: &str,
        keys: &Keys,
        tls: Option<&ClientTlsFiles>,
    ) -> Result<Self, GatewayError> {
        let endpoint = endpoint(address, tls)?;
        let (work, operation) = (endpoint.connect_lazy(), endpoint.connect_lazy());
        let operator = Credentials::of(keys);
        // Only operators' calls carry their key.
        let client = Credentials {
            admin_key: None,
            ..operator.clone()
        };
        let keyed = |channel: &Channel| InterceptedService::new(channel.clone(), client.clone());
        let control = InterceptedService::new(operation.clone(), operator);
        Ok(Self {
            inference: InferenceClient::new(keyed(&work)).max_decoding_message_size(MAX_REPLY_BYTES),
            tokenizer: TokenizerClient::new(keyed(&work)).max_decoding_message_size(MAX_REPLY_BYTES),
            admin: AdminClient::new(keyed(&operation)).max_decoding_message_size(MAX_REPLY_BYTES),
            health: HealthClient::new(keyed(&operation)),
            control: ControlClient::new(control),
        })
    }

    pub(crate) async fn generate(&self, request: GenerateRequest) -> Result<GenerateResponse, RpcError> {
        unwrap(self.inference.clone().generate(request).await)
    }

    pub(crate) async fn generate_stream(&self, request: GenerateRequest) -> Result<Chunks, RpcError> {
        unwrap(self.inference.clone().generate_stream(request).await).map(chunks)
    }

    pub(crate) async fn chat(&self, request: ChatRequest) -> Result<GenerateResponse, RpcError> {
        unwrap(self.inference.clone().chat(request).await)
    }

    pub(crate) async fn chat_stream(&self, request: ChatRequest) -> Result<Chunks, RpcError> {
        unwrap(self.inference.clone().chat_stream(request).await).map(chunks)
    }

    pub(crate) async fn list_models(&self) -> Result<ListModelsResponse, RpcError> {
        let reply = self
            .inference
            .clone()
            .list_models(brief(ListModelsRequest {}))
            .await;
        unwrap(reply)
    }

    pub(crate) async fn status(&self) -> Result<GetStatusResponse, RpcError> {
        unwrap(self.admin.clone().get_status(brief(GetStatusRequest {})).await)
    }

    pub(crate) async fn tokenize(&self, request: TokenizeRequest) -> Result<TokenizeResponse, RpcError> {
        unwrap(self.tokenizer.clone().tokenize(request).await)
    }

    pub(crate) async fn detokenize(
        &self,
        request: DetokenizeRequest,
    ) -> Result<DetokenizeResponse, RpcError> {
        unwrap(self.tokenizer.clone().detokenize(request).await)
    }

    pub(crate) async fn tokenizer_info(&self) -> Result<GetTokenizerInfoResponse, RpcError> {
        let request = brief(GetTokenizerInfoRequest {});
        unwrap(self.tokenizer.clone().get_tokenizer_info(request).await)
    }

    /// Without a deadline: requests in flight take as long as they like. False if somebody resumed before they ended.
    pub(crate) async fn pause(&self, request: PauseRequest) -> Result<bool, RpcError> {
        unwrap(self.control.clone().pause(request).await).map(|reply| reply.paused)
    }

    pub(crate) async fn resume(&self) -> Result<(), RpcError> {
        unwrap(self.control.clone().resume(ResumeRequest {}).await).map(drop)
    }

    /// How many requests of these ids, or without any of all, were running.
    pub(crate) async fn abort_requests(&self, request_ids: Vec<String>) -> Result<u32, RpcError> {
        let request = brief(AbortRequestsRequest { request_ids });
        unwrap(self.control.clone().abort_requests(request).await).map(|reply| reply.aborted)
    }

    /// Ends a client's own request; it is no error if there is none.
    pub(crate) async fn abort_request(&self, request_id: String) -> Result<(), RpcError> {
        let request = brief(AbortRequestRequest { request_id });
        unwrap(self.admin.clone().abort_request(request).await).map(drop)
    }

    pub(crate) async fn reset_prefix_cache(&self, request: ResetPrefixCacheRequest) -> Result<(), RpcError> {
        unwrap(self.control.clone().reset_prefix_cache(request).await).map(drop)
    }

    pub(crate) async fn server_info(&self) -> Result<GetServerInfoResponse, RpcError> {
        let request = brief(GetServerInfoRequest {});
        unwrap(self.admin.clone().get_server_info(request).await)
    }

    /// What the health service says of `Inference`, now and whenever it changes.
    pub(crate) async fn watch_health(&self) -> Result<Streaming<HealthCheckResponse>, Status> {
        let request = HealthCheckRequest {
            service: SERVICE_NAME.to_owned(),
        };
        let updates = self.health.clone().watch(request).await?;
        Ok(updates.into_inner())
    }

    pub(crate) async fn metrics(&self) -> Result<GetMetricsResponse, RpcError> {
        unwrap(self.admin.clone().get_metrics(brief(GetMetricsRequest {})).await)
    }
}

fn endpoint(address: &str, tls: Option<&ClientTlsFiles>) -> Result<Endpoint, GatewayError> {
    let refuse = |reason: String| GatewayError::CoordinatorAddress {
        address: address.to_owned(),
        reason,
    };
    match address.split_once(':') {
        Some(("http", rest)) if rest.starts_with("//") => {}
        Some(("https", rest)) if rest.starts_with("//") => {}
        Some(("unix", path)) if path.starts_with('/') => {}
        _ => return Err(refuse("unknown form".to_owned())),
    }
    let endpoint = Endpoint::from_shared(address.to_owned()).map_err(|error| refuse(error.to_string()))?;
    let endpoint = match tls {
        Some(files) if address.starts_with("https:") => endpoint
            .tls_config(files.load()?)
            .map_err(|error| refuse(error.to_string()))?,
        None if address.starts_with("https:") => {
            return Err(refuse("https needs its authorities".to_owned()));
        }
        _ => endpoint,
    };
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW))
}

/// A request that must be answered within [`ADMIN_DEADLINE`].
fn brief<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ADMIN_DEADLINE);
    request
}

fn unwrap<T>(reply: Result<Response<T>, Status>) -> Result<T, RpcError> {
    reply
        .map(Response::into_inner)
        .map_err(|status| to_error(&status))
}

fn chunks(stream: Streaming<GenerateChunk>) -> Chunks {
    stream
        .map(|chunk| chunk.map_err(|status| to_error(&status)))
        .boxed()
}

/// The coordinator's own errors pass through. What the transport made up becomes `Unavailable`, without the addresses
/// and errno texts in it: those are for the log.
fn to_error(status: &Status) -> RpcError {
    // Only statuses that were made on this side have a source.
    let local = status.source().is_some();
    match status.code() {
        // tonic's client-side deadline is reported as a cancellation.
        Code::DeadlineExceeded | Code::Cancelled if local => {
            RpcError::new(ErrorKind::Unavailable, "the coordinator did not answer in time")
        }
        Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled if local => {
            tracing::warn!(error = %Causes(status), "no connection to the coordinator");
            RpcError::new(ErrorKind::Unavailable, "the coordinator cannot be reached")
        }
        _ => RpcError::from(status),
    }
}

/// An error with what caused it, on one line.
struct Causes<'a>(&'a Status);

impl fmt::Display for Causes<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.0.message())?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(out, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use phalanx_proto::secret::ApiKeys;

    use super::*;

    #[test]
    fn addresses_have_three_forms() {
        for good in [
            "http://127.0.0.1:50051",
            "http://coordinator:50051",
            "unix:/run/phalanx.sock",
        ] {
            assert!(endpoint(good, None).is_ok(), "{good}");
        }
        for bad in [
            "",
            "127.0.0.1:50051",
            "https://host:1",
            "unix:relative",
            "http://",
            "http://a b",
        ] {
            assert!(endpoint(bad, None).is_err(), "{bad}");
        }
    }

    fn keys(clients: &[&str], admins: &[&str]) -> Keys {
        let keys = |keys: &[&str]| ApiKeys::new(keys.iter().map(ToString::to_string)).expect("keys");
        Keys {
            clients: keys(clients),
            admins: keys(admins),
        }
    }

    #[test]
    fn the_first_keys_are_presented() {
        let mut credentials = Credentials::of(&keys(&["first", "second"], &["admin", "other"]));
        let request = credentials.call(Request::new(())).expect("no error");
        let presented = |name| request.metadata().get(name).expect("a header");
        assert_eq!(presented("authorization"), "Bearer first");
        assert_eq!(presented(ADMIN_KEY), "admin");
        let request = Credentials::of(&keys(&[], &[])).call(Request::new(()));
        assert!(request.expect("no error").metadata().is_empty());
    }

    #[tokio::test]
    async fn an_absent_coordinator_is_unavailable_at_once() {
        let backend =
            Backend::new("unix:/nonexistent/phalanx.sock", &keys(&[], &[]), None).expect("a good address");
        let start = Instant::now();
        let error = backend.status().await.expect_err("nobody there");
        assert_eq!(error.kind, ErrorKind::Unavailable);
        assert_eq!(error.message, "the coordinator cannot be reached");
        assert!(start.elapsed() < CONNECT_TIMEOUT);
    }
}

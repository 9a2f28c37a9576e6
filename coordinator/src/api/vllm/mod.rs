//! vLLM's own gRPC services, over the same text side, engine and registry as `phalanx.v1`: requests become ours, our
//! chunks become theirs.

mod control;
mod reply;
mod request;

use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};
use phalanx_proto::{
    ErrorKind, RpcError,
    vllm::{GenerateRequest, GenerateResponse, inference_server::Inference},
};
use tonic::{Request, Response, Status};

pub(super) use control::ControlService;

use self::reply::Replies;
use super::{
    caller::{Caller, Claims},
    inference::InferenceService,
    stream::RequestStream,
};

/// `vllm.Inference`.
pub(super) struct VllmInference(pub(super) Arc<InferenceService>);

impl VllmInference {
    async fn start(&self, request: Request<GenerateRequest>) -> Result<(RequestStream, Replies), RpcError> {
        let caller = Caller::of(
            &request,
            Claims {
                tenant: "",
                timeout_ms: None,
            },
        )?;
        let (request, wanted) = request::to_native(request.into_inner())?;
        let (prepared, registration) = self.0.prepare(request, &caller).await?;
        let replies = Replies::new(wanted, &prepared);
        Ok((self.0.start(prepared, registration, caller)?, replies))
    }
}

#[tonic::async_trait]
impl Inference for VllmInference {
    type GenerateStreamStream = BoxStream<'static, Result<GenerateResponse, Status>>;

    /// One sequence, whole: the reply has room for no more.
    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<GenerateResponse>, Status> {
        let sequences = request
            .get_ref()
            .sampling
            .as_ref()
            .map_or(1, |sampling| sampling.num_sequences);
        if sequences > 1 {
            let message = format!("sampling.num_sequences is {sequences}; more than 1 needs GenerateStream.");
            return Err(RpcError::invalid("sampling.num_sequences", message).into());
        }
        let (mut stream, mut replies) = self.start(request).await?;
        let mut whole: Option<GenerateResponse> = None;
        while let Some(chunk) = stream.next().await {
            if let Some(piece) = replies.convert(chunk?)? {
                match &mut whole {
                    Some(whole) => reply::append(whole, piece),
                    None => whole = Some(piece),
                }
            }
        }
        let whole = whole.ok_or_else(|| RpcError::new(ErrorKind::Internal, "the generation has no end"))?;
        Ok(Response::new(whole))
    }

    async fn generate_stream(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        let running = self.start(request).await?;
        let pieces = stream::unfold(running, |(mut stream, mut replies)| async move {
            loop {
                let piece = match stream.next().await? {
                    Ok(chunk) => replies.convert(chunk).transpose(),
                    Err(error) => Some(Err(error)),
                };
                if let Some(piece) = piece {
                    return Some((piece.map_err(Status::from), (stream, replies)));
                }
            }
        });
        Ok(Response::new(pieces.boxed()))
    }
}

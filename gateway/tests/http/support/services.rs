//! The services beside Inference and Admin: they note what they are asked and give plain answers.

use std::fmt::Debug;

use phalanx_proto::v1::{
    AbortRequestsRequest, AbortRequestsResponse, DetokenizeRequest, DetokenizeResponse,
    GetTokenizerInfoRequest, GetTokenizerInfoResponse, PauseRequest, PauseResponse, ResetPrefixCacheRequest,
    ResetPrefixCacheResponse, ResumeRequest, ResumeResponse, TokenizeRequest, TokenizeResponse,
    control_server::Control, tokenizer_server::Tokenizer,
};
use tonic::{Request, Response, Status};

use super::coordinator::{Received, Scripted};

impl Scripted {
    pub(super) fn note<T: Debug>(&self, request: &Request<T>) {
        let key = request.metadata().get("phalanx-admin-key");
        let key = key.map(|key| key.to_str().expect("ascii").to_owned());
        let message = format!("{:?}", request.get_ref());
        let _ = self.received.send(Received::Other(message, key));
    }
}

#[tonic::async_trait]
impl Control for Scripted {
    async fn pause(&self, request: Request<PauseRequest>) -> Result<Response<PauseResponse>, Status> {
        self.note(&request);
        self.status.lock().expect("not poisoned").paused = true;
        Ok(Response::new(PauseResponse { paused: true }))
    }

    async fn resume(&self, request: Request<ResumeRequest>) -> Result<Response<ResumeResponse>, Status> {
        self.note(&request);
        self.status.lock().expect("not poisoned").paused = false;
        Ok(Response::new(ResumeResponse {}))
    }

    async fn abort_requests(
        &self,
        request: Request<AbortRequestsRequest>,
    ) -> Result<Response<AbortRequestsResponse>, Status> {
        self.note(&request);
        Ok(Response::new(AbortRequestsResponse { aborted: 3 }))
    }

    async fn reset_prefix_cache(
        &self,
        request: Request<ResetPrefixCacheRequest>,
    ) -> Result<Response<ResetPrefixCacheResponse>, Status> {
        self.note(&request);
        Ok(Response::new(ResetPrefixCacheResponse {}))
    }
}

#[tonic::async_trait]
impl Tokenizer for Scripted {
    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        self.note(&request);
        let spelled = request.get_ref().return_token_strs;
        let token_strs = if spelled {
            vec!["a".to_owned(), "Ġb".to_owned()]
        } else {
            Vec::new()
        };
        Ok(Response::new(TokenizeResponse {
            token_ids: vec![7, 8],
            token_strs,
            max_model_len: 2048,
        }))
    }

    async fn detokenize(
        &self,
        request: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        self.note(&request);
        let text = "a b".to_owned();
        Ok(Response::new(DetokenizeResponse { text }))
    }

    async fn get_tokenizer_info(
        &self,
        _: Request<GetTokenizerInfoRequest>,
    ) -> Result<Response<GetTokenizerInfoResponse>, Status> {
        let json = r#"{"tokenizer_class":"PreTrainedTokenizerFast"}"#.to_owned();
        Ok(Response::new(GetTokenizerInfoResponse { json }))
    }
}

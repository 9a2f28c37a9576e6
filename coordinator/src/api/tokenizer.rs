//! The Tokenizer service.

use std::sync::Arc;

use phalanx_proto::v1::{self, tokenizer_server::Tokenizer};
use tonic::{Request, Response, Status};

use super::inference::check_model;
use crate::text::TextProcessor;

pub(super) struct TokenizerService {
    pub(super) text: Arc<TextProcessor>,
    pub(super) models: Vec<v1::ModelCard>,
}

#[tonic::async_trait]
impl Tokenizer for TokenizerService {
    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let request = request.into_inner();
        check_model(&self.models, &request.model)?;
        Ok(Response::new(self.text.tokenize(request).await?))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let request = request.into_inner();
        check_model(&self.models, &request.model)?;
        let text = self.text.detokenize(request.token_ids).await?;
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }

    async fn get_tokenizer_info(
        &self,
        _: Request<v1::GetTokenizerInfoRequest>,
    ) -> Result<Response<v1::GetTokenizerInfoResponse>, Status> {
        let json = self.text.tokenizer_info().to_owned();
        Ok(Response::new(v1::GetTokenizerInfoResponse { json }))
    }
}

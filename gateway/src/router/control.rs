//! What every replica answers alike, and what operators do to all of them.

use futures_util::future::join_all;
use phalanx_proto::{
    RpcError,
    v1::{
        DetokenizeRequest, DetokenizeResponse, GetServerInfoResponse, GetTokenizerInfoResponse, PauseRequest,
        ResetPrefixCacheRequest, TokenizeRequest, TokenizeResponse,
    },
};

use super::Replicas;
use crate::backend::Backend;

impl Replicas {
    pub(crate) async fn tokenize(&self, request: TokenizeRequest) -> Result<TokenizeResponse, RpcError> {
        let ask = |backend: Backend| {
            let request = request.clone();
            async move { backend.tokenize(request).await }
        };
        self.anywhere(ask).await
    }

    pub(crate) async fn detokenize(
        &self,
        request: DetokenizeRequest,
    ) -> Result<DetokenizeResponse, RpcError> {
        let ask = |backend: Backend| {
            let request = request.clone();
            async move { backend.detokenize(request).await }
        };
        self.anywhere(ask).await
    }

    pub(crate) async fn tokenizer_info(&self) -> Result<GetTokenizerInfoResponse, RpcError> {
        self.anywhere(|backend| async move { backend.tokenizer_info().await })
            .await
    }

    pub(crate) async fn server_info(&self) -> Result<GetServerInfoResponse, RpcError> {
        self.anywhere(|backend| async move { backend.server_info().await })
            .await
    }

    /// False if somebody resumed one of them before it stood still.
    pub(crate) async fn pause(&self, request: PauseRequest) -> Result<bool, RpcError> {
        let paused = self
            .everywhere(|backend| async move { backend.pause(request).await })
            .await?;
        Ok(paused.into_iter().all(|paused| paused))
    }

    pub(crate) async fn resume(&self) -> Result<(), RpcError> {
        self.everywhere(|backend| async move { backend.resume().await })
            .await
            .map(drop)
    }

    /// Whether all of them are.
    pub(crate) async fn is_paused(&self) -> Result<bool, RpcError> {
        let status = self
            .everywhere(|backend| async move { backend.status().await })
            .await?;
        Ok(status.into_iter().all(|status| status.paused))
    }

    /// How many requests of these ids, or without any of all, were running.
    pub(crate) async fn abort_requests(&self, request_ids: Vec<String>) -> Result<u32, RpcError> {
        let ask = |backend: Backend| {
            let request_ids = request_ids.clone();
            async move { backend.abort_requests(request_ids).await }
        };
        let aborted = self.everywhere(ask).await?;
        Ok(aborted.into_iter().fold(0, u32::saturating_add))
    }

    /// Ends a client's own request, wherever it runs.
    pub(crate) async fn abort_request(&self, request_id: &str) -> Result<(), RpcError> {
        let ask = |backend: Backend| async move { backend.abort_request(request_id.to_owned()).await };
        self.everywhere(ask).await.map(drop)
    }

    pub(crate) async fn reset_prefix_cache(&self, request: ResetPrefixCacheRequest) -> Result<(), RpcError> {
        self.everywhere(|backend| async move { backend.reset_prefix_cache(request).await })
            .await
            .map(drop)
    }

    /// Asks all replicas at once, and waits for all, whatever one of them says.
    ///
    /// # Errors
    /// The first refusal of any, though others may have done what was asked; or that there is no replica.
    async fn everywhere<T, F, Answer>(&self, ask: F) -> Result<Vec<T>, RpcError>
    where
        F: Fn(Backend) -> Answer,
        Answer: Future<Output = Result<T, RpcError>>,
    {
        if let Some(backend) = self.sole() {
            return Ok(vec![ask(backend.clone()).await?]);
        }
        let replicas = self.shared.pool.list();
        if replicas.is_empty() {
            return Err(self.none_serves());
        }
        let answers = replicas.iter().map(|replica| ask(replica.backend().clone()));
        join_all(answers).await.into_iter().collect()
    }
}

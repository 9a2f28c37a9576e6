//! API keys over gRPC.

use phalanx_proto::{ErrorKind, RpcError, secret::ApiKeys};
use tonic::{Request, Status, service::Interceptor, transport::server::UdsConnectInfo};

use super::caller::Credentials;

/// Admits whoever presents a key (`authorization: Bearer <key>`), and whoever comes over a unix socket: its file has
/// mode 0600, so that is this server's own user, like the gateway beside it.
#[derive(Clone, Debug)]
pub(super) struct KeyCheck(pub(super) ApiKeys);

impl Interceptor for KeyCheck {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let local = is_local(&request);
        let authorization = request.metadata().get("authorization");
        let authorization = authorization.map(|value| value.as_bytes());
        if local || self.0.admit(authorization) {
            // Without keys there is nobody to tell apart, nor to protect from one another.
            let credentials = Credentials {
                speaks_for_others: local || self.0.is_empty() || self.0.is_first(authorization),
                tenant: ApiKeys::tenant(authorization),
            };
            request.extensions_mut().insert(credentials);
            return Ok(request);
        }
        let message = "this server needs an API key: authorization: Bearer <key>";
        Err(RpcError::new(ErrorKind::Unauthenticated, message).into())
    }
}

/// Whether the caller is this server's own user, on this machine.
fn is_local<T>(request: &Request<T>) -> bool {
    request.extensions().get::<UdsConnectInfo>().is_some()
}

/// For what ends or holds up everybody's requests: not even without keys may any stranger on the network do it.
///
/// # Errors
/// `Unauthenticated`.
pub(super) fn check_operator<T>(keys: &ApiKeys, request: &Request<T>) -> Result<(), RpcError> {
    // With keys, `KeyCheck` has seen one.
    if is_local(request) || !keys.is_empty() {
        return Ok(());
    }
    let message = "this call needs a server with --api-key, or its unix socket";
    Err(RpcError::new(ErrorKind::Unauthenticated, message))
}

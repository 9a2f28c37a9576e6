//! API keys over gRPC.

use phalanx_proto::{ErrorKind, RpcError, secret::ApiKeys};
use tonic::{Request, Status, service::Interceptor, transport::server::UdsConnectInfo};

use super::caller::Credentials;

/// Metadata with the key of an operator.
const ADMIN_KEY: &str = "phalanx-admin-key";

/// Admits whoever presents a key (`authorization: Bearer <key>`), and whoever comes over a unix socket.
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

/// Admits operators: whoever presents an admin key, and whoever comes over a unix socket. Without an admin key nobody
/// else is one.
#[derive(Clone, Debug)]
pub(super) struct AdminCheck(pub(super) ApiKeys);

impl AdminCheck {
    /// Errors: `Unauthenticated`, or `PermissionDenied` where no key would help.
    pub(super) fn check<T>(&self, request: &Request<T>) -> Result<(), RpcError> {
        let value = |name| request.metadata().get(name).map(|value| value.as_bytes());
        // Clients made for vLLM can bring a bearer token and nothing else.
        let bearer = !self.0.is_empty() && self.0.admit(value("authorization"));
        let own = value(ADMIN_KEY).is_some_and(|given| self.0.contains(given));
        if is_local(request) || bearer || own {
            return Ok(());
        }
        let (kind, message) = if self.0.is_empty() {
            let message =
                "this server was started without --admin-api-key, so nobody may control it from afar";
            (ErrorKind::PermissionDenied, message.to_owned())
        } else {
            (
                ErrorKind::Unauthenticated,
                format!("this call needs the admin key: {ADMIN_KEY}: <key>, or authorization: Bearer <key>"),
            )
        };
        Err(RpcError::new(kind, message))
    }
}

impl Interceptor for AdminCheck {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        self.check(&request)?;
        Ok(request)
    }
}

/// Admits clients and operators: for a service with calls of both, which asks for operators itself.
#[derive(Clone, Debug)]
pub(super) struct EitherCheck(pub(super) KeyCheck, pub(super) AdminCheck);

impl Interceptor for EitherCheck {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        if self.1.check(&request).is_ok() {
            return Ok(request);
        }
        self.0.call(request)
    }
}

/// A unix socket's file has mode 0600: who comes over it is this server's own user, like the gateway beside it.
fn is_local<T>(request: &Request<T>) -> bool {
    request.extensions().get::<UdsConnectInfo>().is_some()
}

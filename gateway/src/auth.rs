//! Who may ask for what. Everything but the probes needs an API key when any is configured, metrics and unknown routes
//! included; what operators do needs an admin key always.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use phalanx_proto::{ErrorKind, RpcError, secret::ApiKeys};

use crate::{openai::error::ApiError, routes::RouteTable};

/// Where Anthropic's clients put the key.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Everybody: what a kubelet and a load balancer ask. A scraper can bring a key.
    Open,
    /// Whoever has an API key, if there are any.
    Client,
    /// Whoever has an admin key. Without any, nobody.
    Admin,
}

/// The keys of the two kinds of callers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Keys {
    pub(crate) clients: ApiKeys,
    pub(crate) admins: ApiKeys,
}

impl Keys {
    /// Errors: `Unauthenticated`, or `PermissionDenied` where no key would help.
    fn admit(&self, access: Access, headers: &HeaderMap) -> Result<(), RpcError> {
        let authorization = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
        let bare = headers.get(X_API_KEY).map(HeaderValue::as_bytes);
        let holds = |keys: &ApiKeys| keys.admit(authorization) || bare.is_some_and(|key| keys.contains(key));
        let refuse = |kind, message| Err(RpcError::new(kind, message));
        match access {
            Access::Open => Ok(()),
            Access::Client if holds(&self.clients) => Ok(()),
            Access::Client => refuse(
                ErrorKind::Unauthenticated,
                "this server needs an API key: Authorization: Bearer <key>",
            ),
            Access::Admin if self.admins.is_empty() => refuse(
                ErrorKind::PermissionDenied,
                "this route is for operators, and this server was started without --admin-api-key",
            ),
            Access::Admin if holds(&self.admins) => Ok(()),
            Access::Admin => refuse(
                ErrorKind::Unauthenticated,
                "this route needs the admin key: Authorization: Bearer <admin key>",
            ),
        }
    }
}

/// Whose request it is: a name made of the key it came with, which tells nothing of it. An extension of the request.
#[derive(Clone, Debug)]
pub(crate) struct Tenant(pub(crate) Arc<str>);

impl Tenant {
    /// None without a key.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let authorization = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
        let bare = headers.get(X_API_KEY).map(HeaderValue::as_bytes);
        let tenant = ApiKeys::tenant(authorization)
            .or_else(|| ApiKeys::tenant(Some(&[b"Bearer ", bare?].concat())))?;
        Some(Self(tenant.into()))
    }
}

/// Middleware: refuses who may not use the route.
pub(crate) async fn guard(
    State((table, keys)): State<(RouteTable, Keys)>,
    mut request: Request,
    next: Next,
) -> Response {
    let access = table.find(&request).map_or(Access::Client, |route| route.access);
    let Err(error) = keys.admit(access, request.headers()) else {
        if let Some(tenant) = Tenant::of(request.headers()).filter(|_| !keys.clients.is_empty()) {
            request.extensions_mut().insert(tenant);
        }
        return next.run(request).await;
    };
    let challenge = error.kind == ErrorKind::Unauthenticated;
    let mut response = ApiError::from(error).into_response();
    if challenge {
        let bearer = HeaderValue::from_static("Bearer");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, bearer);
    }
    response
}

//! Which coordinators there are, and how requests are spread over them.

use std::{fmt, str::FromStr};

use phalanx_proto::tls::ClientTlsFiles;

use crate::config::GatewayError;

/// Replicas of one gateway; each has connections, a watcher and metrics.
pub(super) const MAX_BACKENDS: usize = 256;

/// Where the coordinators are. All of them serve the same model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backends {
    /// `http://host:port`, `https://host:port` or `unix:/path` of each.
    pub addresses: Vec<String>,
    /// `name:port`: every address that the name has is a coordinator too, asked again every few seconds.
    pub dns: Option<String>,
    /// For `https`.
    pub tls: Option<ClientTlsFiles>,
    pub policy: RoutingPolicy,
}

impl Backends {
    /// The one coordinator at `address`.
    pub fn one(address: impl Into<String>) -> Self {
        Self {
            addresses: vec![address.into()],
            ..Self::default()
        }
    }
}

/// How a request finds its replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RoutingPolicy {
    /// In turn.
    RoundRobin,
    /// To the one with the fewest requests of this gateway running.
    #[default]
    LeastRequest,
    /// Requests of one session to the same one, by rendezvous hashing; those of none as by `LeastRequest`.
    Session,
    /// To the one that has seen the longest beginning of the prompt, unless it has too much to do.
    PrefixAware,
}

impl RoutingPolicy {
    /// All of them, by name.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("round_robin", Self::RoundRobin),
        ("least_request", Self::LeastRequest),
        ("session", Self::Session),
        ("prefix_aware", Self::PrefixAware),
    ];
}

impl fmt::Display for RoutingPolicy {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(_, policy)| policy == self);
        out.write_str(name.map_or("", |(name, _)| name))
    }
}

impl FromStr for RoutingPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::NAMES.iter().find(|(name, _)| *name == text);
        known.map(|(_, policy)| *policy).ok_or_else(|| {
            let names = Self::NAMES.map(|(name, _)| name);
            format!("it is none of {}", names.join(", "))
        })
    }
}

/// # Errors
/// No backend, too many, or a name without a port.
pub(super) fn check(backends: &Backends) -> Result<(), GatewayError> {
    let count = backends.addresses.len();
    if count == 0 && backends.dns.is_none() {
        return Err(GatewayError::NoBackend);
    }
    if count > MAX_BACKENDS {
        return Err(GatewayError::TooManyBackends {
            count,
            limit: MAX_BACKENDS,
        });
    }
    let has_port = |name: &String| {
        name.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|port| port > 0)
        })
    };
    match &backends.dns {
        Some(name) if !has_port(name) => Err(GatewayError::BackendDns { name: name.clone() }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_have_the_names_they_print() {
        for (name, policy) in RoutingPolicy::NAMES {
            assert_eq!((policy.to_string().as_str(), name.parse()), (name, Ok(policy)));
        }
        assert!("random".parse::<RoutingPolicy>().is_err());
    }

    #[test]
    fn something_to_ask_is_needed() {
        let dns = |name: &str| {
            check(&Backends {
                dns: Some(name.to_owned()),
                ..Backends::default()
            })
        };
        assert!(matches!(
            check(&Backends::default()),
            Err(GatewayError::NoBackend)
        ));
        assert!(check(&Backends::one("unix:/a")).is_ok() && dns("model.default.svc:50051").is_ok());
        for bad in ["model", ":50051", "model:0", "model:port", "http://model:50051"] {
            assert!(matches!(dns(bad), Err(GatewayError::BackendDns { .. })), "{bad}");
        }
        let many = Backends {
            addresses: vec!["unix:/a".to_owned(); MAX_BACKENDS + 1],
            ..Backends::default()
        };
        assert!(matches!(
            check(&many),
            Err(GatewayError::TooManyBackends { count: 257, .. })
        ));
    }
}

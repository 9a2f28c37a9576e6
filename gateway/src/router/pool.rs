//! The replicas there are: those of the command line, and those that a name resolves to.

use std::sync::{Arc, PoisonError, RwLock};

use phalanx_proto::tls::ClientTlsFiles;

use super::{Backends, RouterMetrics, replica::Replica};
use crate::{auth::Keys, backend::Backend, config::GatewayError};

pub(super) type List = Arc<[Arc<Replica>]>;

pub(super) struct Pool {
    /// The only coordinator there can be: nothing to choose, to watch or to fall back to.
    sole: Option<Backend>,
    fixed: Vec<Arc<Replica>>,
    all: RwLock<List>,
    keys: Keys,
    tls: Option<ClientTlsFiles>,
    metrics: RouterMetrics,
}

impl Pool {
    /// Errors: an address of neither form.
    pub(super) fn new(
        backends: &Backends,
        keys: &Keys,
        metrics: RouterMetrics,
    ) -> Result<Self, GatewayError> {
        let mut addresses = backends.addresses.clone();
        addresses.sort();
        addresses.dedup();
        let (mut sole, mut fixed) = (None, Vec::new());
        match addresses.as_slice() {
            [address] if backends.dns.is_none() => {
                sole = Some(Backend::new(address, keys, backends.tls.as_ref())?)
            }
            addresses => {
                for address in addresses {
                    fixed.push(Replica::watched(
                        address,
                        Backend::new(address, keys, backends.tls.as_ref())?,
                        &metrics,
                    ));
                }
            }
        }
        Ok(Self {
            sole,
            all: RwLock::new(fixed.clone().into()),
            fixed,
            keys: keys.clone(),
            tls: backends.tls.clone(),
            metrics,
        })
    }

    pub(super) fn sole(&self) -> Option<&Backend> {
        self.sole.as_ref()
    }

    /// As of now; who holds it keeps its replicas alive.
    pub(super) fn list(&self) -> List {
        // The list is replaced whole, so a panic elsewhere does not spoil it.
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&all)
    }

    /// These are the addresses of the name now. A replica that stays keeps its state, one that goes keeps its streams.
    pub(super) fn set_resolved(&self, addresses: &[String]) {
        let before = self.list();
        let known = |address: &String| before.iter().find(|replica| replica.address() == address);
        let mut list = self.fixed.clone();
        for address in addresses {
            if list.iter().any(|replica| replica.address() == address) {
                continue;
            }
            match known(address) {
                Some(replica) => list.push(Arc::clone(replica)),
                None => match Backend::new(address, &self.keys, self.tls.as_ref()) {
                    Ok(backend) => {
                        tracing::info!(backend = address, "found");
                        list.push(Replica::watched(address, backend, &self.metrics));
                    }
                    Err(error) => tracing::warn!(%error, "a resolved address is left out"),
                },
            }
        }
        let stays = |gone: &Replica| list.iter().any(|replica| replica.address() == gone.address());
        for replica in before.iter().filter(|replica| !stays(replica)) {
            tracing::info!(backend = replica.address(), "gone");
            self.metrics.forget(replica.address());
        }
        *self.all.write().unwrap_or_else(PoisonError::into_inner) = list.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(addresses: &[&str], dns: bool) -> Pool {
        let backends = Backends {
            addresses: addresses.iter().map(|&address| address.to_owned()).collect(),
            dns: dns.then(|| "model:1".to_owned()),
            ..Backends::default()
        };
        Pool::new(&backends, &Keys::default(), RouterMetrics::default()).expect("good addresses")
    }

    #[tokio::test]
    async fn one_fixed_coordinator_is_no_choice() {
        assert!(pool(&["unix:/a"], false).sole().is_some());
        assert!(
            pool(&["unix:/a", "unix:/a"], false).sole().is_some(),
            "the same twice"
        );
        assert!(pool(&["unix:/a"], true).sole().is_none());
        assert!(pool(&["unix:/a", "unix:/b"], false).sole().is_none());
    }

    #[tokio::test]
    async fn resolved_replicas_come_and_go_and_fixed_ones_stay() {
        let pool = pool(&["http://a:1"], true);
        let addresses = |pool: &Pool| -> Vec<String> {
            pool.list()
                .iter()
                .map(|replica| replica.address().to_owned())
                .collect()
        };
        let name = |text: &str| text.to_owned();
        pool.set_resolved(&[name("http://a:1"), name("http://b:1"), name("http://c:1")]);
        assert_eq!(addresses(&pool), ["http://a:1", "http://b:1", "http://c:1"]);
        let before = pool.list();
        pool.set_resolved(&[name("http://c:1"), name("http://d:1")]);
        assert_eq!(addresses(&pool), ["http://a:1", "http://c:1", "http://d:1"]);
        assert!(Arc::ptr_eq(&before[2], &pool.list()[1]), "c is the same replica");
    }
}

//! A name whose addresses are replicas, such as a headless service in Kubernetes.

use std::{io, sync::Weak, time::Duration};

use tokio::{
    net::lookup_host,
    time::{sleep, timeout},
};

use super::{config::MAX_BACKENDS, pool::Pool};

/// Between two questions. The system's resolver does not tell how long an answer holds; Kubernetes says 5 s by default.
const REFRESH: Duration = Duration::from_secs(5);
/// A resolver that is slower is asked again.
const DEADLINE: Duration = Duration::from_secs(10);

/// Keeps `pool` at what `name` (`host:port`) resolves to, until the pool is gone. While the name does not resolve, the
/// last answer stays: whether those replicas live is for their health to say.
pub(super) async fn follow(name: String, pool: Weak<Pool>) {
    let mut failing = false;
    loop {
        let found = resolve(&name).await;
        let Some(pool) = pool.upgrade() else { return };
        match found {
            Ok(addresses) => {
                failing = false;
                pool.set_resolved(&addresses);
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(name, %error, "the backends' name does not resolve");
                }
            }
        }
        drop(pool);
        sleep(REFRESH).await;
    }
}

/// The addresses in the form of a backend's, sorted, each once.
async fn resolve(name: &str) -> io::Result<Vec<String>> {
    let found = timeout(DEADLINE, lookup_host(name)).await??;
    let mut addresses: Vec<String> = found.map(|address| format!("http://{address}")).collect();
    addresses.sort();
    addresses.dedup();
    if addresses.len() > MAX_BACKENDS {
        tracing::warn!(
            name,
            count = addresses.len(),
            limit = MAX_BACKENDS,
            "more backends than are used"
        );
        addresses.truncate(MAX_BACKENDS);
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_are_backends() {
        assert_eq!(
            resolve("127.0.0.1:50051").await.expect("an address"),
            ["http://127.0.0.1:50051"]
        );
        assert_eq!(
            resolve("[::1]:50051").await.expect("an address"),
            ["http://[::1]:50051"]
        );
        let local = resolve("localhost:7").await.expect("this host");
        assert!(
            local.contains(&"http://127.0.0.1:7".to_owned()) || local.contains(&"http://[::1]:7".to_owned())
        );
        assert!(resolve("name.invalid:7").await.is_err());
    }
}

//! A scripted coordinator, a raw HTTP client, and a gateway between them.

mod client;
mod coordinator;
mod services;

use std::net::SocketAddr;

pub(crate) use client::{Connection, Reply, delete, get, get_with, post, post_with};
pub(crate) use coordinator::{Coordinator, Script};
use phalanx_gateway::{Backends, Gateway, GatewayConfig};
use tokio::{sync::oneshot, task::JoinHandle};

/// A running gateway; told to shut down when dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    shutdown: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start(config: GatewayConfig) -> Self {
        let gateway = Gateway::bind(config).await.expect("bind");
        let address = gateway.local_addrs()[0];
        let (shutdown, asked) = oneshot::channel();
        let task = tokio::spawn(gateway.run(async {
            // A dropped sender is a shutdown too.
            let _ = asked.await;
        }));
        Self {
            address,
            shutdown: Some(shutdown),
            task,
        }
    }

    /// Asks for the shutdown.
    pub(crate) fn shut_down(&mut self) {
        drop(self.shutdown.take());
    }

    /// Waits until the gateway has ended.
    pub(crate) async fn ended(self) {
        drop(self.shutdown);
        self.task.await.expect("the gateway ends without a panic");
    }
}

/// A configuration on a free port for `coordinator`.
pub(crate) fn config(coordinator: &Coordinator) -> GatewayConfig {
    GatewayConfig::new("127.0.0.1:0", Backends::one(coordinator.address()))
}

/// A scripted coordinator and a gateway for it.
pub(crate) async fn pair(script: Script) -> (Coordinator, Server) {
    let coordinator = Coordinator::start(script).await;
    let server = Server::start(config(&coordinator)).await;
    (coordinator, server)
}

//! `phalanx gateway`: the HTTP side.

use std::{pin::pin, time::Duration};

use anyhow::Context;
use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser},
};
use phalanx_gateway::{Backends, Gateway, GatewayConfig, RouteOptions, RoutingPolicy};
use phalanx_proto::{secret::ApiKeys, tls::ClientTlsFiles};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use tokio::sync::oneshot;

use crate::{
    args::{FrontendArgs, GatewayArgs, LoggingArgs},
    keys,
    logging::tracer,
    signals::Signals,
};

/// The coordinators. All of them serve the same model with the same flags.
#[derive(Debug, Args)]
pub(crate) struct BackendArgs {
    /// `unix:/path`, `http://host:port` or `https://host:port` of the coordinator.
    #[arg(
        long,
        env = "PHALANX_COORDINATOR",
        required_unless_present_any = ["backend", "backend_dns"]
    )]
    coordinator: Option<String>,
    /// A replica's coordinator: `host:port` or any of those; for several, repeat it or separate
    /// them by commas.
    #[arg(long, env = "PHALANX_BACKEND", value_delimiter = ',')]
    backend: Vec<String>,
    /// A name and a port: every address that the name has is a replica's coordinator. For a headless service.
    // TLS would need the name, of which only the addresses are left.
    #[arg(
        long,
        env = "PHALANX_BACKEND_DNS",
        value_name = "NAME:PORT",
        conflicts_with = "coordinator_ca_certs"
    )]
    backend_dns: Option<String>,
    /// Which replica gets a request: the next; the one with the fewest running; the one of its session (X-Session-Id,
    /// or `user`); the one that has seen the beginning of its prompt.
    #[arg(
        long,
        env = "PHALANX_ROUTING_POLICY",
        default_value_t = RoutingPolicy::default(),
        value_parser = PossibleValuesParser::new(RoutingPolicy::NAMES.map(|(name, _)| name))
            .try_map(|name| name.parse::<RoutingPolicy>())
    )]
    routing_policy: RoutingPolicy,
}

impl BackendArgs {
    fn resolve(self, tls: Option<ClientTlsFiles>) -> Backends {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let backends = self.backend.into_iter().map(|backend| {
            if backend.contains('/') {
                backend
            } else {
                format!("{scheme}://{backend}")
            }
        });
        Backends {
            addresses: self.coordinator.into_iter().chain(backends).collect(),
            dns: self.backend_dns,
            tls,
            policy: self.routing_policy,
        }
    }
}

pub(crate) fn run(args: GatewayArgs, logging: &LoggingArgs) -> anyhow::Result<()> {
    if let Some(parent) = args.parent_pid {
        die_with(parent)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let result = runtime.block_on(serve(args, logging));
    // Drops what still runs, and the listeners with their socket files.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn serve(args: GatewayArgs, logging: &LoggingArgs) -> anyhow::Result<()> {
    let mut signals = Signals::install()?;
    let drain = Duration::from_secs(args.shutdown_timeout);
    let mut config = config(
        args.frontend,
        args.backends.resolve(args.coordinator_tls.files()),
        drain,
    );
    config.api_keys = keys::load(&args.api_key, args.api_key_file.as_deref())?;
    config.tls = args.tls.files();
    config.log_requests = logging.enable_log_requests;
    config.tracer = tracer(logging)?;
    config.admin_keys = ApiKeys::new(args.admin_api_key).context("--admin-api-key")?;
    let gateway = Gateway::bind(config).await?;
    for address in gateway.local_addrs() {
        tracing::info!(%address, "HTTP gateway listening");
    }
    let (drain, draining) = oneshot::channel::<()>();
    let mut running = pin!(gateway.run(async {
        // The sender lives until it has sent.
        let _ = draining.await;
    }));
    tokio::select! {
        () = running.as_mut() => return Ok(()),
        name = signals.next() => tracing::info!("{name}: letting running streams end"),
    }
    let _ = drain.send(());
    tokio::select! {
        () = running => Ok(()),
        name = signals.next() => anyhow::bail!("{name} again: running streams were cut off"),
    }
}

/// The gateway's settings from the flags.
fn config(frontend: FrontendArgs, backends: Backends, drain_timeout: Duration) -> GatewayConfig {
    let mut config = GatewayConfig::new(format!("{}:{}", frontend.host, frontend.port), backends);
    if frontend.uds.is_some() {
        config.listen.clear();
    }
    config.uds = frontend.uds;
    config.reply = frontend.reply.options();
    config.responses = frontend.responses.limits();
    config.response_role = frontend.response_role;
    config.drain_timeout = drain_timeout;
    config.routes = RouteOptions {
        root_path: frontend.root_path,
        tokenizer_info: frontend.enable_tokenizer_info_endpoint,
        docs: !frontend.disable_fastapi_docs,
    };
    config
}

/// Asks the kernel to end this process with its parent, and ends it if the parent has gone already.
fn die_with(parent: u32) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("prctl(PR_SET_PDEATHSIG)")?;
    let current = getppid().map_or(0, |pid| Pid::as_raw(Some(pid)) as u32);
    anyhow::ensure!(current == parent, "the parent process {parent} is gone");
    Ok(())
}

//! `phalanx gateway`: the HTTP side.

use std::{pin::pin, time::Duration};

use anyhow::Context;
use phalanx_gateway::{Gateway, GatewayConfig};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use tokio::sync::oneshot;

use crate::{
    args::{FrontendArgs, GatewayArgs, LoggingArgs},
    keys,
    logging::tracer,
    signals::Signals,
};

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
    let mut config = config(args.frontend, args.coordinator, drain);
    config.api_keys = keys::load(&args.api_key, args.api_key_file.as_deref())?;
    config.tls = args.tls.files();
    config.coordinator_tls = args.coordinator_tls.files();
    config.log_requests = logging.enable_log_requests;
    config.tracer = tracer(logging)?;
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
fn config(frontend: FrontendArgs, coordinator: String, drain_timeout: Duration) -> GatewayConfig {
    let mut config = GatewayConfig::new(format!("{}:{}", frontend.host, frontend.port), coordinator);
    if frontend.uds.is_some() {
        config.listen.clear();
    }
    config.uds = frontend.uds;
    config.drain_timeout = drain_timeout;
    config
}

/// Asks the kernel to end this process with its parent, and ends it if the parent has gone already.
fn die_with(parent: u32) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("prctl(PR_SET_PDEATHSIG)")?;
    let current = getppid().map_or(0, |pid| Pid::as_raw(Some(pid)) as u32);
    anyhow::ensure!(current == parent, "the parent process {parent} is gone");
    Ok(())
}

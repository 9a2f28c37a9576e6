//! `phalanx worker`: one rank.

use std::time::Duration;

use phalanx_worker::{DeviceChoice, WorkerConfig};

use crate::args::{Device, WorkerArgs};

/// A coordinator in another container may start later than its workers.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn run(args: WorkerArgs) -> anyhow::Result<()> {
    let config = WorkerConfig {
        coordinator: args.coordinator,
        tls: args.tls.files(),
        rank: args.rank,
        join_token: args.join_token,
        cpus: args.cpus,
        device: match args.device {
            Device::Auto => DeviceChoice::Auto,
            Device::Cpu => DeviceChoice::Cpu,
            Device::Cuda => DeviceChoice::Cuda,
        },
        expected_parent: args.parent_pid,
        threads: None,
        connect_limit: CONNECT_LIMIT,
    };
    // The step loop has a thread of its own; this runtime only carries the attach stream.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(phalanx_worker::run(config))?;
    Ok(())
}

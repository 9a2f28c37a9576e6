//! `phalanx worker`: one rank.

use phalanx_worker::WorkerConfig;

use crate::args::WorkerArgs;

pub(crate) fn run(args: WorkerArgs) -> anyhow::Result<()> {
    let config = WorkerConfig {
        coordinator: args.coordinator,
        rank: args.rank,
        join_token: args.join_token,
        cpus: args.cpus,
        expected_parent: args.parent_pid,
        ..WorkerConfig::default()
    };
    // The step loop has a thread of its own; this runtime only carries the attach stream.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(phalanx_worker::run(config))?;
    Ok(())
}

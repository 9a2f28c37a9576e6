//! `phalanx serve` and `phalanx coordinator`: start, serve until a signal or a failure, stop everything.

use std::{
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::Context;
use phalanx_coordinator::{
    Coordinator,
    config::{CoordinatorConfig, WorkerSource},
};
use phalanx_proto::socket::remove_stale;
use tokio::{
    process::{Child, Command},
    time,
};

use crate::{
    args::{CoordinatorArgs, ExecutorBackend, LoggingArgs, ServeArgs},
    progress, resolve,
    runtime_dir::RuntimeDir,
    signals::Signals,
};

/// A gateway that ends unasked is started again after a pause, which doubles each time it does not live long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// A gateway that has lived so long could start: whatever ended it was not its configuration.
const PROVEN_AFTER: Duration = Duration::from_secs(10);
/// A gateway that is told a second time to end leaves within this time, or is killed.
const GATEWAY_HURRY: Duration = Duration::from_secs(1);
/// What the gateway may take beyond the drain time before it is killed.
const GATEWAY_GRACE: Duration = Duration::from_secs(5);

pub(crate) fn serve(args: ServeArgs, logging: &LoggingArgs) -> anyhow::Result<()> {
    let directory = RuntimeDir::create().context("cannot make the directory of the gRPC socket")?;
    let program = own_binary()?;
    let model = resolve::model(&args.model)?;
    let config = CoordinatorConfig {
        engine: resolve::engine(&args.engine, &model)?,
        model,
        api: resolve::api(&args.engine, (&args.tls, logging), directory.socket())?,
        workers: resolve::workers(
            &args.engine,
            &args.model,
            resolve::local_workers(program.clone(), logging.arguments(), directory.path()),
        )?,
    };
    let gateway = GatewayCommand::new(&args, logging, &program, config.api.uds.as_deref());
    run(config, args.engine.shutdown_timeout, Some(gateway))
}

pub(crate) fn coordinator(args: CoordinatorArgs, logging: &LoggingArgs) -> anyhow::Result<()> {
    let directory = RuntimeDir::create().context("cannot make the directory of the gRPC socket")?;
    let model = resolve::model(&args.model)?;
    let source = match (args.distributed_executor_backend, args.join_token) {
        (ExecutorBackend::ExternalLauncher, Some(join_token)) => WorkerSource::External { join_token },
        _ => resolve::local_workers(own_binary()?, logging.arguments(), directory.path()),
    };
    let config = CoordinatorConfig {
        engine: resolve::engine(&args.engine, &model)?,
        model,
        api: resolve::api(&args.engine, (&args.tls, logging), directory.socket())?,
        workers: resolve::workers(&args.engine, &args.model, source)?,
    };
    run(config, args.engine.shutdown_timeout, None)
}

fn own_binary() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("cannot find this program's own binary")
}

fn run(
    config: CoordinatorConfig,
    shutdown_timeout: u64,
    gateway: Option<GatewayCommand>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let drain = Duration::from_secs(shutdown_timeout);
    let result = runtime.block_on(supervise(config, drain, gateway));
    // Tokenization of a request that was given up may still run; nobody waits for it.
    runtime.shutdown_background();
    result
}

/// The life of a server. Whatever ends it, everything that was started is stopped before this returns.
async fn supervise(
    config: CoordinatorConfig,
    drain: Duration,
    gateway: Option<GatewayCommand>,
) -> anyhow::Result<()> {
    let mut signals = Signals::install()?;
    let coordinator = Coordinator::start(config).await?;
    let mut gateway = match gateway.map(GatewayProcess::start).transpose() {
        Ok(gateway) => gateway,
        Err(error) => {
            coordinator.stop(Duration::ZERO).await;
            return Err(error);
        }
    };
    let outcome = tokio::select! {
        outcome = serve_until_failure(&coordinator, &mut gateway) => outcome,
        name = signals.next() => {
            tracing::info!("{name}: letting running requests end, for at most {} s", drain.as_secs());
            Ok(())
        }
        () = coordinator.asked_to_stop() => {
            tracing::info!("asked by a client: letting running requests end, for at most {} s", drain.as_secs());
            Ok(())
        }
    };
    let drain = if outcome.is_ok() { drain } else { Duration::ZERO };
    tokio::select! {
        () = stop(&coordinator, gateway.as_mut(), drain) => {}
        name = signals.again() => {
            tracing::warn!("{name} again: ending now");
            if let Some(gateway) = &mut gateway {
                gateway.end(GATEWAY_HURRY).await;
            }
        }
    }
    coordinator.stop(Duration::from_secs(2)).await;
    outcome
}

async fn serve_until_failure(
    coordinator: &Coordinator,
    gateway: &mut Option<GatewayProcess>,
) -> anyhow::Result<()> {
    let ready = async {
        tokio::select! {
            result = coordinator.wait_ready() => result,
            // Ends only by being dropped.
            () = progress::show(coordinator.status()) => std::future::pending().await,
        }
    };
    let serving = async {
        ready.await?;
        tracing::info!("ready");
        coordinator.failed().await;
        Err(anyhow::Error::from(
            coordinator.wait_ready().await.err().context("the group ended")?,
        ))
    };
    match gateway {
        Some(gateway) => tokio::select! {
            outcome = serving => outcome,
            outcome = gateway.keep_alive() => outcome,
        },
        None => serving.await,
    }
}

/// Lets requests end: first the gateway, whose clients are waiting, then the coordinator's own.
async fn stop(coordinator: &Coordinator, gateway: Option<&mut GatewayProcess>, drain: Duration) {
    coordinator.begin_drain();
    if let Some(gateway) = gateway {
        gateway.end(drain + GATEWAY_GRACE).await;
    }
    coordinator.drain(drain).await;
}

/// How to start the gateway.
struct GatewayCommand {
    program: PathBuf,
    arguments: Vec<String>,
    /// Variables with the keys.
    keys: [(&'static str, String); 2],
    uds: Option<PathBuf>,
}

impl GatewayCommand {
    fn new(args: &ServeArgs, logging: &LoggingArgs, program: &Path, socket: Option<&Path>) -> Self {
        let frontend = &args.frontend;
        let socket = socket
            .map(|path| format!("unix:{}", path.display()))
            .unwrap_or_default();
        let mut arguments = vec!["gateway".to_owned(), "--coordinator".into(), socket];
        let mut flag = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        flag("--host", frontend.host.clone());
        flag("--port", frontend.port.to_string());
        if let Some(path) = &frontend.uds {
            flag("--uds", path.to_string_lossy().into_owned());
        }
        flag("--root-path", frontend.root_path.clone());
        flag("--response-role", frontend.response_role.clone());
        flag("--shutdown-timeout", args.engine.shutdown_timeout.to_string());
        flag("--parent-pid", std::process::id().to_string());
        for (name, given) in [
            (
                "--enable-tokenizer-info-endpoint",
                frontend.enable_tokenizer_info_endpoint,
            ),
            ("--disable-fastapi-docs", frontend.disable_fastapi_docs),
        ] {
            arguments.extend(given.then(|| name.to_owned()));
        }
        arguments.extend(frontend.reply.arguments());
        if let Some(path) = &args.engine.api_key_file {
            arguments.push(format!("--api-key-file={}", path.display()));
        }
        arguments.extend(args.tls.arguments());
        arguments.extend(frontend.responses.arguments());
        arguments.extend(logging.arguments());
        Self {
            program: program.to_owned(),
            arguments,
            keys: [
                ("PHALANX_API_KEY", args.engine.api_key.join(",")),
                ("PHALANX_ADMIN_API_KEY", args.engine.admin_api_key.join(",")),
            ],
            uds: frontend.uds.clone(),
        }
    }

    fn spawn(&self) -> anyhow::Result<Child> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        // In a process group of its own: Ctrl-C at a terminal is for the coordinator, which then stops the gateway.
        command.process_group(0);
        // Its flags are all here; the file's are not its own.
        command.env_remove("PHALANX_CONFIG");
        for (name, keys) in self.keys.iter().filter(|(_, keys)| !keys.is_empty()) {
            // Not an argument: those are readable by everybody on the machine.
            command.env(name, keys);
        }
        command.spawn().context("cannot start the gateway")
    }
}

/// The gateway as a child process.
struct GatewayProcess {
    command: GatewayCommand,
    child: Child,
    started: time::Instant,
}

impl GatewayProcess {
    fn start(command: GatewayCommand) -> anyhow::Result<Self> {
        Ok(Self {
            child: command.spawn()?,
            command,
            started: time::Instant::now(),
        })
    }

    /// Starts it again whenever it ends. Returns only when it never was up: a port that is taken or a bad flag would
    /// end it again.
    async fn keep_alive(&mut self) -> anyhow::Result<()> {
        let (mut pause, mut proven) = (FIRST_PAUSE, false);
        loop {
            let status: ExitStatus = self.child.wait().await?;
            let lived = self.started.elapsed();
            let failed = status.code().is_some_and(|code| code != 0);
            proven |= !failed || lived >= PROVEN_AFTER;
            anyhow::ensure!(proven, "the gateway ended with {status}");
            if lived >= PROVEN_AFTER {
                pause = FIRST_PAUSE;
            }
            tracing::error!(%status, ?lived, ?pause, "the gateway ended, starting it again");
            time::sleep(pause).await;
            pause = (2 * pause).min(LONGEST_PAUSE);
            self.child = self.command.spawn()?;
            self.started = time::Instant::now();
        }
    }

    /// SIGTERM: the first lets running streams end, a second cuts them off. SIGKILL if it has not ended within `limit`.
    async fn end(&mut self, limit: Duration) {
        let pid = self
            .child
            .id()
            .and_then(|pid| rustix::process::Pid::from_raw(pid as i32));
        if let Some(pid) = pid {
            // The pid is ours until the child has been waited for.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        if time::timeout(limit, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
            if let Some(path) = &self.command.uds {
                // It could not do so itself. One that somebody else listens on stays.
                let _ = remove_stale(path);
            }
        }
    }
}

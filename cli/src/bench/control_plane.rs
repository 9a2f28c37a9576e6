//! `phalanx bench control-plane`: what the way from a step's output to a client costs when the step costs nothing.
//!
//! The coordinator runs in this process, the gateway in its own as in a deployment, and the load comes from this
//! process' first thread. Ranks are simulated.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    net::TcpListener,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Args;
use indicatif::ProgressBar;
use phalanx_bench::{Api, Arrivals, Endpoint, Report, Run, Workload};
use phalanx_coordinator::control_plane::{ControlPlane, ControlPlaneConfig};
use serde::Serialize;
use tokio::process::{Child, Command};

use crate::runtime_dir::RuntimeDir;

const MODEL_NAME: &str = "control-plane";
/// The gateway has no model to load.
const GATEWAY_START: Duration = Duration::from_secs(10);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(600);
/// The names of the threads of this process, as the kernel shows them.
const LOAD_THREAD: &str = "load";
const COORDINATOR_THREADS: &str = "coordinator";

#[derive(Debug, Args)]
pub(super) struct BenchControlPlaneArgs {
    /// Whose tokenizer is used: a .gguf file or a model directory.
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Requests in all.
    #[arg(long, default_value_t = 4000)]
    num_prompts: usize,
    /// Streams at a time, all of them in one step.
    #[arg(long, default_value_t = 1000)]
    max_concurrency: usize,
    /// Tokens per prompt.
    #[arg(long, default_value_t = 32)]
    random_input_len: usize,
    /// Tokens per answer.
    #[arg(long, default_value_t = 256)]
    random_output_len: usize,
    /// Milliseconds that a simulated step takes. 0: no time, so that tokens come faster than they can be sent and are
    /// sent several at a time.
    #[arg(long, default_value_t = 0.0)]
    step_ms: f64,
    /// Print JSON and nothing else.
    #[arg(long)]
    json: bool,
}

/// What was measured.
#[derive(Debug, Serialize)]
struct ControlPlaneReport {
    #[serde(flatten)]
    report: Report,
    /// CPU seconds of each part.
    cpu_seconds: BTreeMap<String, f64>,
    /// Of all parts but the load generator, per output token.
    cpu_us_per_token: f64,
}

pub(super) fn run(args: &BenchControlPlaneArgs) -> anyhow::Result<()> {
    anyhow::ensure!(
        (0.0..=60_000.0).contains(&args.step_ms),
        "--step-ms is {}, must be between 0 and 60000",
        args.step_ms
    );
    let workload = args.workload();
    workload.check()?;
    let directory = RuntimeDir::create().context("cannot make the directory of the gRPC socket")?;
    let coordinator = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name(COORDINATOR_THREADS)
        .enable_all()
        .build()?;
    let control_plane = {
        let _runtime = coordinator.enter();
        ControlPlane::start(&args.control_plane(directory.socket()))?
    };
    // The client takes as little as it can from the parts that are measured.
    let load = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let measured = load.block_on(measure(args, &workload, &directory));
    coordinator.block_on(control_plane.stop());
    let report = measured?;
    #[expect(clippy::print_stdout, reason = "the result is what was asked for")]
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    anyhow::ensure!(
        report.report.failed == 0,
        "{} requests failed",
        report.report.failed
    );
    Ok(())
}

impl BenchControlPlaneArgs {
    fn workload(&self) -> Workload {
        Workload {
            api: Api::Completions,
            model: MODEL_NAME.to_owned(),
            num_prompts: self.num_prompts,
            max_concurrency: self.max_concurrency,
            arrivals: Arrivals::Closed,
            input_len: self.random_input_len,
            prefix_len: 0,
            output_len: self.random_output_len,
            // Every tokenizer has so many.
            token_ids: 0..256,
            temperature: 0.0,
            ignore_eos: true,
            seed: 0,
        }
    }

    fn control_plane(&self, uds: PathBuf) -> ControlPlaneConfig {
        ControlPlaneConfig {
            model: self.model.clone(),
            uds,
            served_model_name: MODEL_NAME.to_owned(),
            max_num_seqs: self.max_concurrency as u32,
            max_model_len: (self.random_input_len + self.random_output_len) as u32,
            step_time: Duration::from_secs_f64(self.step_ms / 1e3),
        }
    }
}

async fn measure(
    args: &BenchControlPlaneArgs,
    workload: &Workload,
    directory: &RuntimeDir,
) -> anyhow::Result<ControlPlaneReport> {
    let (mut gateway, endpoint) = start_gateway(directory).await?;
    let pid = gateway.id().context("the gateway ended")?;
    let bar = if args.json {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(workload.num_prompts as u64)
    };
    let mut progress = |ended: usize| bar.set_position(ended as u64);
    let before = cpu_seconds(pid)?;
    let run = phalanx_bench::run(&endpoint, workload, REQUEST_TIMEOUT, &mut progress).await;
    let after = cpu_seconds(pid)?;
    bar.finish_and_clear();
    gateway.kill().await?;
    Ok(ControlPlaneReport::new(&run, &before, after))
}

/// Starts a gateway as `phalanx serve` does, and waits until it listens. It ends with this process.
async fn start_gateway(directory: &RuntimeDir) -> anyhow::Result<(Child, Endpoint)> {
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let program = std::env::current_exe().context("cannot find this program's own binary")?;
    let child = Command::new(program)
        .args(["gateway", "--host", "127.0.0.1", "--log-level", "error"])
        .args(["--port", &address.port().to_string()])
        .args(["--parent-pid", &std::process::id().to_string()])
        .arg("--coordinator")
        .arg(format!("unix:{}", directory.socket().display()))
        .env_remove("PHALANX_CONFIG")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context("cannot start the gateway")?;
    let begun = Instant::now();
    while let Err(error) = tokio::net::TcpStream::connect(address).await {
        anyhow::ensure!(
            begun.elapsed() < GATEWAY_START,
            "the gateway does not listen: {error}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok((child, Endpoint::new(&format!("http://{address}"), None)?))
}

/// CPU seconds so far, by part: the threads of this process by name, and the gateway.
fn cpu_seconds(gateway: u32) -> io::Result<BTreeMap<String, f64>> {
    let mut parts = BTreeMap::new();
    let own = fs::read_dir("/proc/self/task")?.map(|task| (None, task));
    let gateways = fs::read_dir(format!("/proc/{gateway}/task"))?.map(|task| (Some("gateway"), task));
    for (part, task) in own.chain(gateways) {
        let path = task?.path();
        // A thread may have ended since it was listed.
        let (Ok(name), Ok(times)) = (
            fs::read_to_string(path.join("comm")),
            fs::read_to_string(path.join("schedstat")),
        ) else {
            continue;
        };
        let nanoseconds: f64 = times
            .split_whitespace()
            .next()
            .and_then(|time| time.parse().ok())
            .unwrap_or(0.0);
        let first = path.file_name() == Some(std::process::id().to_string().as_ref());
        let part = part.unwrap_or(if first { LOAD_THREAD } else { name.trim() });
        *parts.entry(part.to_owned()).or_default() += nanoseconds / 1e9;
    }
    Ok(parts)
}

impl ControlPlaneReport {
    fn new(run: &Run, before: &BTreeMap<String, f64>, after: BTreeMap<String, f64>) -> Self {
        let report = Report::of(run);
        let cpu_seconds: BTreeMap<String, f64> = after
            .into_iter()
            .map(|(part, time)| {
                let used = time - before.get(&part).unwrap_or(&0.0);
                (part, used)
            })
            .collect();
        let parts = cpu_seconds.iter().filter(|(part, _)| *part != LOAD_THREAD);
        let total: f64 = parts.map(|(_, time)| time).sum();
        Self {
            cpu_us_per_token: 1e6 * total / report.total_output_tokens.max(1) as f64,
            report,
            cpu_seconds,
        }
    }
}

impl fmt::Display for ControlPlaneReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.report)?;
        write!(f, "CPU seconds        ")?;
        for (part, time) in &self.cpu_seconds {
            write!(f, " {part} {time:.2};")?;
        }
        writeln!(
            f,
            " {:.1} us per output token without the load",
            self.cpu_us_per_token
        )
    }
}

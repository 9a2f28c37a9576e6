//! Coordinators without gateways and gateways over them, each a process of its own.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use serde_json::Value;

use crate::{
    demo_model, http, phalanx,
    processes::{self, eventually},
    server::{assert_gone, free_port},
};

/// From start to serving, in an unoptimized build on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(120);

/// A process of ours. Killed when dropped, with all that it has started.
struct Process {
    child: Child,
    log: PathBuf,
    _directory: tempfile::TempDir,
}

impl Process {
    fn start(arguments: &[String]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let log = directory.path().join("log");
        let output = std::fs::File::create(&log).expect("a log file");
        let child = Command::new(phalanx())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a second handle"))
            .stderr(output)
            .spawn()
            .expect("phalanx starts");
        Self {
            child,
            log,
            _directory: directory,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let family = processes::family(self.child.id());
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            show(&std::fs::read_to_string(&self.log).unwrap_or_default());
        } else {
            assert_gone(&family);
        }
    }
}

#[expect(clippy::print_stderr, reason = "the test harness shows it with the failure")]
fn show(log: &str) {
    eprintln!("---- output of phalanx ----\n{log}");
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// A replica of the demo model: a coordinator with one rank. Dropping it is `kill -9`.
pub struct Replica {
    /// `host:port` of its gRPC.
    pub address: String,
    process: Process,
}

impl Replica {
    /// Does not wait for it to be ready.
    pub fn start() -> Self {
        Self::start_at(free_port())
    }

    pub fn start_at(port: u16) -> Self {
        let mut arguments = strings(&["coordinator", &demo_model().to_string_lossy()]);
        arguments.extend(strings(&["--grpc-port", &port.to_string()]));
        arguments.extend(strings(&["--served-model-name", "demo"]));
        arguments.extend(strings(&["--max-model-len", "2048", "--threads-per-rank", "1"]));
        arguments.extend(strings(&["--kv-cache-memory-bytes", "256Mi"]));
        // Whoever is told to end cuts its streams off at once.
        arguments.extend(strings(&["--shutdown-timeout", "0"]));
        Self {
            address: format!("127.0.0.1:{port}"),
            process: Process::start(&arguments),
        }
    }

    /// Ends it as an update does, by SIGTERM.
    pub fn terminate(mut self) {
        processes::kill(self.process.child.id(), Signal::TERM);
        assert!(self.process.child.wait().expect("it ends").success());
    }

    pub fn port(&self) -> u16 {
        let (_, port) = self.address.rsplit_once(':').expect("host:port");
        port.parse().expect("a port")
    }
}

/// A gateway over replicas.
pub struct Gateway {
    /// `host:port` of its HTTP.
    pub address: String,
    _process: Process,
}

impl Gateway {
    /// `extra` says where the replicas are.
    pub fn start(extra: &[&str]) -> Self {
        let port = free_port();
        let mut arguments = strings(&["gateway", "--host", "127.0.0.1", "--port", &port.to_string()]);
        arguments.extend(strings(extra));
        Self {
            address: format!("127.0.0.1:{port}"),
            _process: Process::start(&arguments),
        }
    }

    /// Waits until so many replicas serve.
    pub fn wait_serving(&self, count: usize) {
        eventually("serving replicas", READY_LIMIT, || self.serving() == Some(count));
    }

    /// Replicas that serve, by `/health`; none while the gateway itself starts.
    fn serving(&self) -> Option<usize> {
        let health = http::get(&self.address, "/health").ok()?.json();
        let backends = health["backends"].as_array()?.iter();
        Some(backends.filter(|backend| backend["state"] == "serving").count())
    }

    /// The sum of a metric over its samples that hold `label`.
    pub fn metric(&self, name: &str, label: &str) -> f64 {
        let text = http::get(&self.address, "/metrics").expect("metrics").text();
        let samples = text
            .lines()
            .filter(|line| line.starts_with(name) && line.contains(label));
        samples
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    pub fn post(&self, path: &str, body: &Value) -> http::Reply {
        http::post(&self.address, path, body).expect("a reply")
    }
}

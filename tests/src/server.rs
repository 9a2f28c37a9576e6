//! `phalanx serve` as a user starts it.

use std::{
    ffi::OsStr,
    net::TcpListener,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    demo_model, http, phalanx,
    processes::{self, eventually},
};

/// From start to ready, in an unoptimized build on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// From SIGTERM to gone.
const STOP_LIMIT: Duration = Duration::from_secs(30);

pub struct Server {
    child: Child,
    /// `host:port` of the gateway.
    pub address: String,
    /// All output of all processes.
    pub log: PathBuf,
    /// What `/metrics` asks for.
    key: Option<String>,
    _directory: tempfile::TempDir,
}

impl Server {
    /// Starts the demo model and waits until it is ready.
    pub fn start(extra: &[&str]) -> Self {
        let server = Self::launch(&demo_model().to_string_lossy(), extra);
        server.wait_ready();
        server
    }

    /// Starts any model and does not wait.
    pub fn launch(model: &str, extra: &[&str]) -> Self {
        Self::launch_in(model, extra, &[])
    }

    /// The same with changes to the environment.
    pub fn launch_in(model: &str, extra: &[&str], environment: &[(&str, &OsStr)]) -> Self {
        Self::spawn(model, extra, |command| {
            command.envs(environment.iter().copied());
        })
    }

    /// The same in a process group of its own, as a shell starts it.
    pub fn launch_in_group(model: &str, extra: &[&str]) -> Self {
        Self::spawn(model, extra, |command| {
            command.process_group(0);
        })
    }

    fn spawn(model: &str, extra: &[&str], adapt: impl FnOnce(&mut Command)) -> Self {
        let port = free_port();
        let directory = tempfile::tempdir().expect("a temporary directory");
        let log = directory.path().join("log");
        let output = std::fs::File::create(&log).expect("a log file");
        let mut command = Command::new(phalanx());
        command
            .args([
                "serve",
                model,
                "--host",
                "127.0.0.1",
                "--port",
                &port.to_string(),
                "--served-model-name",
                "demo",
            ])
            .args(extra)
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a second handle"))
            .stderr(output);
        adapt(&mut command);
        let child = command.spawn().expect("phalanx starts");
        Self {
            child,
            address: format!("127.0.0.1:{port}"),
            log,
            key: extra
                .windows(2)
                .find(|pair| pair[0] == "--api-key")
                .map(|pair| pair[1].to_owned()),
            _directory: directory,
        }
    }

    pub fn wait_ready(&self) {
        let deadline = Instant::now() + READY_LIMIT;
        while !http::get(&self.address, "/health").is_ok_and(|reply| reply.status == 200) {
            assert!(
                processes::is_alive(self.pid()),
                "phalanx ended:\n{}",
                self.log_text()
            );
            assert!(
                Instant::now() < deadline,
                "not ready within {READY_LIMIT:?}:\n{}",
                self.log_text()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The same where there is no port to ask: on a unix socket.
    pub fn wait_logged(&self, words: &str) {
        eventually(words, READY_LIMIT, || {
            assert!(
                processes::is_alive(self.pid()),
                "phalanx ended:\n{}",
                self.log_text()
            );
            self.log_text().contains(words)
        });
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Coordinator, workers and gateway.
    pub fn family(&self) -> Vec<u32> {
        processes::family(self.pid())
    }

    /// The processes of one part: `worker` or `gateway`.
    pub fn part(&self, name: &str) -> Vec<u32> {
        processes::with_argument(&self.family()[1..], name)
    }

    pub fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for the end of the main process, which something else has caused.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        eventually("the end of phalanx", limit, || {
            !processes::is_alive(self.child.id())
        });
        self.child.wait().expect("it can be waited for")
    }

    /// SIGTERM, then everything must be gone.
    pub fn stop(mut self) -> ExitStatus {
        let family = self.family();
        processes::kill(self.pid(), Signal::TERM);
        let status = self.wait(STOP_LIMIT);
        assert_gone(&family);
        status
    }

    /// A greedy completion's text.
    pub fn complete(&self, prompt: &str, max_tokens: u32) -> String {
        let body = json!({"model": "demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0});
        let reply = http::post(&self.address, "/v1/completions", &body).expect("a reply");
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.json()["choices"][0]["text"]
            .as_str()
            .expect("text")
            .to_owned()
    }

    /// The value of a metric (summed over its label sets); none if it is not exposed.
    pub fn metric(&self, name: &str) -> Option<f64> {
        self.metric_where(name, "")
    }

    /// The same over the label sets that hold `label`.
    pub fn metric_where(&self, name: &str, label: &str) -> Option<f64> {
        let reply = match &self.key {
            Some(key) => http::get_keyed(&self.address, "/metrics", key),
            None => http::get(&self.address, "/metrics"),
        };
        let text = reply.expect("metrics").text();
        let values = text.lines().filter(|line| {
            line.contains(label)
                && line
                    .strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        let values: Vec<f64> = values
            .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
            .collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// Waits until nothing runs, nothing waits and no block is held.
    pub fn wait_idle(&self) {
        let names = [
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
        ];
        eventually("idle gauges", Duration::from_secs(10), || {
            names.iter().all(|name| self.metric(name) == Some(0.0))
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let family = self.family();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprint_log(&self.log_text());
        } else {
            assert_gone(&family);
        }
    }
}

#[expect(clippy::print_stderr, reason = "the test harness shows it with the failure")]
fn eprint_log(text: &str) {
    eprintln!("---- output of phalanx ----\n{text}");
}

/// None of these processes is left.
pub fn assert_gone(family: &[u32]) {
    eventually("every process gone", Duration::from_secs(10), || {
        family.iter().all(|pid| !processes::is_alive(*pid))
    });
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port()
}

/// A chat request of one user turn.
pub fn chat(content: &str) -> Value {
    json!({"model": "demo", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 64})
}

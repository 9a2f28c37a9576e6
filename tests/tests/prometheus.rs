//! Prometheus itself, as Debian packages it: promtool reads `/metrics`, and a real server scrapes it.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use phalanx_tests::{
    http,
    processes::{self, eventually},
    server::{Server, free_port},
};
use rustix::process::Signal;

const KEY: &str = "sesame";
/// Of promtool's opinions the one that vLLM's names cannot satisfy: colons are for recording rules.
const COLONS: &str = "metric names should not contain ':'";
/// And one that a single name of vLLM's cannot: a histogram that is called a total.
const TOTAL: &str = "vllm:iteration_tokens_total non-counter metrics should not have \"_total\" suffix";

/// Whether the package is there; says so if it is not.
#[expect(
    clippy::print_stderr,
    reason = "a test that tests nothing must not look like one that passed"
)]
fn installed() -> bool {
    let runs = |tool: &str| Command::new(tool).arg("--version").output().is_ok();
    let both = runs("promtool") && runs("prometheus");
    if !both {
        eprintln!("SKIPPED: no prometheus and promtool; ./scripts/test installs them where apt-get can");
    }
    both
}

/// What `promtool check metrics` has to say of an exposition, line by line.
fn lints(exposition: &str) -> Vec<String> {
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool");
    let mut stdin = promtool.stdin.take().expect("piped");
    stdin
        .write_all(exposition.as_bytes())
        .expect("it reads all of it");
    drop(stdin);
    let output = promtool.wait_with_output().expect("it ends");
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&said)
        .lines()
        .map(str::to_owned)
        .collect()
}

/// A Prometheus that scrapes `target` every second, on a port of its own.
struct Prometheus {
    process: Child,
    address: String,
}

impl Prometheus {
    fn start(directory: &Path, target: &str) -> Self {
        let address = format!("127.0.0.1:{}", free_port());
        let config = directory.join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs:\n  - job_name: phalanx\n    authorization: \
             {{credentials: {KEY}}}\n    static_configs: [{{targets: [\"{target}\"]}}]\n"
        );
        fs::write(&config, text).expect("written");
        let process = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                directory.join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .arg("--log.level=warn")
            .stdin(Stdio::null())
            .spawn()
            .expect("prometheus");
        Self { process, address }
    }

    /// The value of the first series that `query` finds.
    fn query(&self, query: &str) -> Option<f64> {
        let reply = http::get(&self.address, &format!("/api/v1/query?query={query}")).ok()?;
        // It answers 503 until it has read its own log.
        if reply.status != 200 {
            return None;
        }
        let value = reply.json()["data"]["result"][0]["value"][1].as_str()?.parse();
        Some(value.expect("a number"))
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        processes::kill(self.process.id(), Signal::TERM);
        let _ = self.process.wait();
    }
}

#[test]
fn promtool_accepts_the_metrics_and_prometheus_scrapes_them() {
    if !installed() {
        return;
    }
    let server = Server::start(&["-tp", "2", "--max-model-len", "512"]);
    server.complete("One, two,", 8);
    let exposition = http::get(&server.address, "/metrics").expect("metrics").text();
    let (colons, others): (Vec<_>, Vec<_>) = lints(&exposition)
        .into_iter()
        .partition(|line| line.starts_with("vllm:") && line.ends_with(COLONS));
    assert!(colons.len() > 30, "promtool has read vLLM's names: {colons:?}");
    assert_eq!(others, [TOTAL]);

    let directory = tempfile::tempdir().expect("a directory");
    let prometheus = Prometheus::start(directory.path(), &server.address);
    eventually("a scrape", Duration::from_secs(60), || {
        prometheus.query("up") == Some(1.0)
    });
    assert_eq!(prometheus.query("vllm:generation_tokens_total"), Some(8.0));
    assert_eq!(
        prometheus.query("phalanx_ranks%7Bphase=%22serving%22%7D"),
        Some(2.0)
    );
    drop(prometheus);
    assert!(server.stop().success());
}

#[test]
fn prometheus_brings_the_key_that_metrics_need() {
    if !installed() {
        return;
    }
    let server = Server::start(&["--max-model-len", "512", "--api-key", KEY]);
    assert_eq!(
        http::get(&server.address, "/metrics").expect("a reply").status,
        401
    );
    let directory = tempfile::tempdir().expect("a directory");
    let prometheus = Prometheus::start(directory.path(), &server.address);
    eventually("a scrape", Duration::from_secs(60), || {
        prometheus.query("up") == Some(1.0)
    });
    drop(prometheus);
    assert!(server.stop().success());
}

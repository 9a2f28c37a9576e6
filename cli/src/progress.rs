//! What a start looks like: a bar per rank on a terminal, log lines otherwise.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use phalanx_proto::v1::{GetStatusResponse, Phase, RankStatus};
use tokio::sync::watch;

/// Log lines of one rank are at least this far apart.
const LOG_INTERVAL: Duration = Duration::from_secs(2);

/// Shows the ranks' progress until dropped (cancelled) or the status has no more source.
pub(crate) async fn show(mut status: watch::Receiver<GetStatusResponse>) {
    let mut view: Box<dyn View + Send> = if std::io::stderr().is_terminal() {
        Box::new(Bars::default())
    } else {
        Box::new(Lines {
            logged: Instant::now(),
        })
    };
    loop {
        let ranks = status.borrow_and_update().ranks.clone();
        view.update(&ranks);
        if status.changed().await.is_err() {
            return;
        }
    }
}

trait View {
    fn update(&mut self, ranks: &[RankStatus]);
}

#[derive(Default)]
struct Bars {
    all: MultiProgress,
    bars: Vec<ProgressBar>,
}

impl View for Bars {
    fn update(&mut self, ranks: &[RankStatus]) {
        const TEMPLATE: &str = "rank {prefix} {msg:24} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        for rank in ranks.iter().skip(self.bars.len()) {
            let style =
                ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
            self.bars.push(
                self.all
                    .add(ProgressBar::new(0))
                    .with_style(style)
                    .with_prefix(rank.rank.to_string()),
            );
        }
        for (bar, rank) in self.bars.iter().zip(ranks) {
            bar.set_length(rank.bytes_total);
            bar.set_position(rank.bytes_done);
            bar.set_message(words(rank.phase()));
            if rank.phase() == Phase::Serving {
                bar.finish_and_clear();
            }
        }
    }
}

struct Lines {
    logged: Instant,
}

impl View for Lines {
    fn update(&mut self, ranks: &[RankStatus]) {
        if self.logged.elapsed() < LOG_INTERVAL {
            return;
        }
        self.logged = Instant::now();
        for rank in ranks {
            let (done, total) = (rank.bytes_done, rank.bytes_total);
            if rank.phase() == Phase::WarmingUp {
                tracing::info!(rank = rank.rank, "capturing CUDA graphs: {done} of {total}");
                continue;
            }
            tracing::info!(
                rank = rank.rank,
                bytes_done = done,
                bytes_total = total,
                "{}",
                words(rank.phase())
            );
        }
    }
}

fn words(phase: Phase) -> &'static str {
    match phase {
        Phase::Unspecified | Phase::Starting => "starting",
        Phase::LoadingWeights => "loading weights",
        Phase::AllocatingKv => "allocating KV cache",
        Phase::JoiningGroup => "joining group",
        Phase::WarmingUp => "warming up",
        Phase::Serving => "serving",
    }
}

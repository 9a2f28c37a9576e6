//! What vLLM has no name for: ranks, steps, and the segment between them. Native names have no colon, which Prometheus
//! keeps for recording rules.

use std::collections::BTreeMap;

use phalanx_proto::v1::{Phase, RankStatus};
use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use super::families::{ITERATION_TOKENS_BUCKETS, REQUEST_LATENCY_BUCKETS, add, histogram};

/// A step of a small model takes under a millisecond, one that waits for its deadline a minute.
const STEP_BUCKETS: [f64; 16] = [
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
];

type ByRank = Family<[(&'static str, String); 1], Gauge>;
type ByPhase = Family<[(&'static str, &'static str); 1], Gauge>;

pub(super) struct GroupMetrics {
    pub(super) steps: Counter,
    pub(super) step_seconds: Histogram,
    pub(super) step_forward_seconds: Histogram,
    pub(super) step_rows: Histogram,
    pub(super) recovery_seconds: Histogram,
    pub(super) epoch: Gauge,
    pub(super) paused: Gauge,
    pub(super) ranks_lost: Counter,
    pub(super) segment_bytes: Gauge,
    ranks: RankMetrics,
}

struct RankMetrics {
    by_phase: ByPhase,
    resident_bytes: ByRank,
    loaded_bytes: ByRank,
    barriers: ByRank,
}

impl RankMetrics {
    fn new(r: &mut Registry) -> Self {
        Self {
            by_phase: add(r, "phalanx_ranks", "Ranks by phase", ByPhase::default()),
            resident_bytes: add(
                r,
                "phalanx_rank_resident_bytes",
                "Memory of a rank's process when it had loaded",
                ByRank::default(),
            ),
            loaded_bytes: add(
                r,
                "phalanx_rank_loaded_bytes",
                "What a rank has done of its phase: bytes of weights while it loads",
                ByRank::default(),
            ),
            barriers: add(
                r,
                "phalanx_rank_barriers",
                "Barriers of the segment that a rank has reached, modulo 2^32",
                ByRank::default(),
            ),
        }
    }
}

impl GroupMetrics {
    pub(super) fn new(r: &mut Registry) -> Self {
        Self {
            steps: add(
                r,
                "phalanx_steps",
                "Steps that went through every rank",
                Counter::default(),
            ),
            step_seconds: histogram(
                r,
                "phalanx_step_seconds",
                "Handing a plan to the ranks to its output",
                &STEP_BUCKETS,
            ),
            step_forward_seconds: histogram(
                r,
                "phalanx_step_forward_seconds",
                "The part of a step that rank 0 computes, barriers included",
                &STEP_BUCKETS,
            ),
            step_rows: histogram(
                r,
                "phalanx_step_rows",
                "Sequences in a step",
                &ITERATION_TOKENS_BUCKETS,
            ),
            recovery_seconds: histogram(
                r,
                "phalanx_recovery_seconds",
                "Loss of the group to the next one",
                &REQUEST_LATENCY_BUCKETS,
            ),
            epoch: add(
                r,
                "phalanx_epoch",
                "Incarnation of the rank group",
                Gauge::default(),
            ),
            paused: add(
                r,
                "phalanx_paused",
                "Whether an operator holds the engine still",
                Gauge::default(),
            ),
            ranks_lost: add(
                r,
                "phalanx_ranks_lost",
                "Ranks that were lost",
                Counter::default(),
            ),
            segment_bytes: add(
                r,
                "phalanx_segment_bytes",
                "Shared memory of the rank group",
                Gauge::default(),
            ),
            ranks: RankMetrics::new(r),
        }
    }

    /// `counts` in rank order.
    pub(super) fn observe_barriers(&self, counts: &[u32]) {
        for (rank, &count) in counts.iter().enumerate() {
            let label = [("rank", rank.to_string())];
            self.ranks.barriers.get_or_create(&label).set(count.into());
        }
    }

    pub(super) fn observe_ranks(&self, ranks: &[RankStatus]) {
        let mut counts: BTreeMap<&str, i64> = PHASES.iter().map(|phase| (name(*phase), 0)).collect();
        for status in ranks {
            *counts.entry(name(status.phase())).or_default() += 1;
            let label = [("rank", status.rank.to_string())];
            self.ranks
                .resident_bytes
                .get_or_create(&label)
                .set(status.rss_bytes as i64);
            self.ranks
                .loaded_bytes
                .get_or_create(&label)
                .set(status.bytes_done as i64);
        }
        for (phase, count) in counts {
            self.ranks.by_phase.get_or_create(&[("phase", phase)]).set(count);
        }
    }
}

const PHASES: [Phase; 6] = [
    Phase::Starting,
    Phase::LoadingWeights,
    Phase::AllocatingKv,
    Phase::JoiningGroup,
    Phase::WarmingUp,
    Phase::Serving,
];

fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Unspecified | Phase::Starting => "starting",
        Phase::LoadingWeights => "loading_weights",
        Phase::AllocatingKv => "allocating_kv",
        Phase::JoiningGroup => "joining_group",
        Phase::WarmingUp => "warming_up",
        Phase::Serving => "serving",
    }
}

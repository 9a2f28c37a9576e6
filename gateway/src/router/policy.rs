//! The choice of a replica.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use super::{
    RoutingPolicy,
    affinity::{Affinity, Memory, weight},
    replica::Replica,
};

/// A replica with fewer requests than this is never too busy for a prompt that it knows.
const FREE_LOAD: u64 = 4;

pub(super) struct Chooser {
    policy: RoutingPolicy,
    turn: AtomicUsize,
    memory: Mutex<Memory>,
}

impl Chooser {
    pub(super) fn new(policy: RoutingPolicy) -> Self {
        Self {
            policy,
            turn: AtomicUsize::new(0),
            memory: Mutex::default(),
        }
    }

    /// Whether [`Affinity::blocks`] are looked at.
    pub(super) fn wants_blocks(&self) -> bool {
        self.policy == RoutingPolicy::PrefixAware
    }

    /// The replica for a request, none of `avoid`; none if no other may be given one.
    pub(super) fn choose(
        &self,
        replicas: &[Arc<Replica>],
        affinity: &Affinity,
        avoid: &[u64],
    ) -> Option<Arc<Replica>> {
        let now = Instant::now();
        let may = |replica: &&Arc<Replica>| !avoid.contains(&replica.id()) && replica.is_eligible(now);
        let mut open: Vec<&Arc<Replica>> = replicas.iter().filter(may).collect();
        if open.is_empty() {
            return None;
        }
        // Whoever comes first among equals is another one each time.
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % open.len();
        open.rotate_left(turn);
        let chosen = match (self.policy, affinity.session) {
            (RoutingPolicy::RoundRobin, _) => open.first().copied(),
            (RoutingPolicy::Session, Some(session)) => heaviest(&open, session),
            (RoutingPolicy::PrefixAware, _) if !affinity.blocks.is_empty() => {
                self.by_prefix(&open, &affinity.blocks)
            }
            _ => open.iter().copied().min_by_key(|replica| replica.running()),
        };
        chosen.cloned()
    }

    /// Of those that are not too busy, who has seen the longest beginning; for one that nobody has seen, who all
    /// gateways agree on.
    fn by_prefix<'a>(&self, open: &[&'a Arc<Replica>], blocks: &[u64]) -> Option<&'a Arc<Replica>> {
        let bound = load_bound(open);
        let free = open.iter().copied().filter(|replica| replica.running() < bound);
        let free: Vec<&Arc<Replica>> = free.collect();
        // Only what a choice learns changes it, so a panic elsewhere does not spoil it.
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = blocks.iter().rev().find_map(|&block| {
            let id = memory.replica_of(block)?;
            free.iter().copied().find(|replica| replica.id() == id)
        });
        let chosen = seen.or_else(|| heaviest(&free, *blocks.first()?))?;
        memory.learn(blocks, chosen.id());
        Some(chosen)
    }
}

fn heaviest<'a>(replicas: &[&'a Arc<Replica>], key: u64) -> Option<&'a Arc<Replica>> {
    replicas
        .iter()
        .copied()
        .max_by_key(|replica| weight(key, replica.id()))
}

/// How many requests a replica may have and still get one for its memory's sake: 5/4 of its share, the new one counted
/// (consistent hashing with bounded loads, Mirrokni et al. 2018). The least busy one is always below it.
fn load_bound(replicas: &[&Arc<Replica>]) -> i64 {
    let total: i64 = replicas.iter().map(|replica| replica.running()).sum();
    // A gauge is signed; this one is never below zero.
    let total = u64::try_from(total).unwrap_or(0) + 1;
    let shares = 4 * replicas.len().max(1) as u64;
    (5 * total).div_ceil(shares).max(FREE_LOAD) as i64
}

#[cfg(test)]
mod tests {
    use phalanx_proto::{ErrorKind, RpcError};

    use super::{
        super::replica::{Running, tests::replicas},
        *,
    };

    fn ids(chooser: &Chooser, replicas: &[Arc<Replica>], affinity: &Affinity, count: usize) -> Vec<u64> {
        (0..count)
            .map(|_| {
                chooser
                    .choose(replicas, affinity, &[])
                    .expect("all may be chosen")
                    .id()
            })
            .collect()
    }

    fn of_session(session: u64) -> Affinity {
        Affinity {
            session: Some(session),
            blocks: Vec::new(),
        }
    }

    #[tokio::test]
    async fn round_robin_leaves_out_who_is_ill_or_avoided() {
        let replicas = replicas(3);
        let chooser = Chooser::new(RoutingPolicy::RoundRobin);
        let turns = ids(&chooser, &replicas, &Affinity::default(), 6);
        assert_eq!(turns[..3], turns[3..]);
        let mut each = turns[..3].to_vec();
        each.sort_unstable();
        each.dedup();
        assert_eq!(each.len(), 3);
        replicas[0].failed(&RpcError::new(ErrorKind::Unavailable, "gone"));
        let avoid = [replicas[1].id()];
        for _ in 0..4 {
            let chosen = chooser.choose(&replicas, &Affinity::default(), &avoid);
            assert_eq!(chosen.expect("one is left").id(), replicas[2].id());
        }
        let all: Vec<u64> = replicas.iter().map(|replica| replica.id()).collect();
        assert!(chooser.choose(&replicas, &Affinity::default(), &all).is_none());
    }

    #[tokio::test]
    async fn the_least_busy_gets_it() {
        let replicas = replicas(3);
        let _busy: Vec<Running> = [0, 0, 2]
            .map(|at: usize| Running::on(Arc::clone(&replicas[at])))
            .into();
        let chooser = Chooser::new(RoutingPolicy::LeastRequest);
        assert_eq!(
            ids(&chooser, &replicas, &Affinity::default(), 5),
            [replicas[1].id(); 5]
        );
    }

    #[tokio::test]
    async fn a_lost_replica_moves_its_own_sessions_only() {
        let replicas = replicas(4);
        let chooser = Chooser::new(RoutingPolicy::Session);
        let place = |session| ids(&chooser, &replicas, &of_session(session), 1)[0];
        let before: Vec<u64> = (0..200).map(place).collect();
        for replica in &replicas {
            let share = before.iter().filter(|&&id| id == replica.id()).count();
            assert!((20..90).contains(&share), "{share} of 200");
        }
        replicas[1].failed(&RpcError::new(ErrorKind::Unavailable, "gone"));
        for (session, &id) in (0..).zip(&before) {
            assert_eq!(place(session) == id, id != replicas[1].id(), "session {session}");
        }
    }

    #[tokio::test]
    async fn a_prompt_goes_where_its_beginning_is_known_until_that_is_too_busy() {
        let replicas = replicas(2);
        let chooser = Chooser::new(RoutingPolicy::PrefixAware);
        let prompt = |blocks: &[u64]| Affinity {
            session: None,
            blocks: blocks.to_vec(),
        };
        let first = ids(&chooser, &replicas, &prompt(&[1, 2]), 1)[0];
        assert_eq!(ids(&chooser, &replicas, &prompt(&[1, 2, 3]), 5), [first; 5]);
        let home = replicas.iter().find(|replica| replica.id() == first);
        let home = home.expect("one of the two");
        let _busy: Vec<Running> = (0..8).map(|_| Running::on(Arc::clone(home))).collect();
        let other = ids(&chooser, &replicas, &prompt(&[1, 2, 4]), 1)[0];
        assert_ne!(other, first, "8 of 8 requests are too many for one of two");
        assert!(load_bound(&replicas.iter().collect::<Vec<_>>()) <= 8);
    }
}

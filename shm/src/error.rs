//! Errors, and the names of those who are part of them.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Who takes part in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Party {
    Engine,
    Rank(u32),
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Engine => f.write_str("the engine"),
            Self::Rank(rank) => write!(f, "rank {rank}"),
        }
    }
}

/// Why a group was aborted. It crosses processes as one word in the segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AbortReason {
    /// The group is closed on purpose.
    Shutdown,
    /// A party did not come in time.
    TimedOut(Party),
    /// A party's process is gone, or its connection.
    Lost(Party),
    /// A party's bytes or calls did not match those of its peers.
    OutOfStep(Party),
    /// The process that created the segment is gone.
    CreatorGone,
    /// The caller's own code.
    Other(u16),
}

impl AbortReason {
    const ENGINE: u16 = u16::MAX;

    /// The rank that the group was aborted because of, if it was one.
    pub fn rank(self) -> Option<u32> {
        match self {
            Self::TimedOut(Party::Rank(rank))
            | Self::Lost(Party::Rank(rank))
            | Self::OutOfStep(Party::Rank(rank)) => Some(rank),
            _ => None,
        }
    }

    /// Never 0, which means "not aborted".
    pub(crate) fn code(self) -> u32 {
        let party = |party| match party {
            Party::Engine => Self::ENGINE,
            Party::Rank(rank) => u16::try_from(rank).unwrap_or(Self::ENGINE - 1),
        };
        let (kind, detail) = match self {
            Self::Shutdown => (1, 0),
            Self::TimedOut(who) => (2, party(who)),
            Self::Lost(who) => (3, party(who)),
            Self::OutOfStep(who) => (4, party(who)),
            Self::CreatorGone => (5, 0),
            Self::Other(code) => (6, code),
        };
        kind << 16 | u32::from(detail)
    }

    pub(crate) fn from_code(code: u32) -> Option<Self> {
        let detail = (code & 0xffff) as u16;
        let party = match detail {
            Self::ENGINE => Party::Engine,
            rank => Party::Rank(rank.into()),
        };
        match code >> 16 {
            0 if detail == 0 => None,
            1 => Some(Self::Shutdown),
            2 => Some(Self::TimedOut(party)),
            3 => Some(Self::Lost(party)),
            4 => Some(Self::OutOfStep(party)),
            5 => Some(Self::CreatorGone),
            _ => Some(Self::Other(detail)),
        }
    }
}

impl fmt::Display for AbortReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("the group is closed"),
            Self::TimedOut(party) => write!(f, "{party} timed out"),
            Self::Lost(party) => write!(f, "{party} is lost"),
            Self::OutOfStep(party) => write!(f, "{party} is out of step"),
            Self::CreatorGone => f.write_str("the process that created the segment is gone"),
            Self::Other(code) => write!(f, "code {code}"),
        }
    }
}

/// What a party was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaited {
    /// To arrive at the barrier of this number (modulo 2^30, the first is 1).
    Barrier(u32),
    /// To be done with a plan, so that its slot can be filled again.
    PlanRead,
    /// To be done with an output, so that its slot can be filled again.
    OutputRead,
    /// To do its part of the output that the engine waits for.
    Output,
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Barrier(number) => write!(f, "reach barrier #{number}"),
            Self::PlanRead => f.write_str("free a plan slot"),
            Self::OutputRead => f.write_str("free an output slot"),
            Self::Output => f.write_str("finish its part of the output"),
        }
    }
}

/// A field of a [`GroupShape`](crate::GroupShape) beyond its limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}, allowed is {allowed}")]
pub struct OutOfRange {
    pub field: &'static str,
    pub value: u64,
    pub allowed: &'static str,
}

/// What is wrong with a segment's header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderProblem {
    #[error("the magic number is not that of a segment")]
    Magic,
    #[error("layout version {found}, this build speaks {supported}")]
    Version { found: u32, supported: u32 },
    #[error("the checksum does not match")]
    Checksum,
    #[error(transparent)]
    Shape(#[from] OutOfRange),
    #[error("the shape takes {expected} bytes, the file has {found}")]
    Size { expected: u64, found: u64 },
}

/// What did not match in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Corruption {
    #[error("{field} is {found:#x}, expected {expected:#x}")]
    Field {
        field: &'static str,
        found: u64,
        expected: u64,
    },
    #[error("length {found} exceeds the slot's {limit}")]
    Length { found: u64, limit: u64 },
}

/// Errors of this crate. Where a wait fails with [`Aborted`](Self::Aborted) the segment is finished.
#[derive(Debug, thiserror::Error)]
pub enum ShmError {
    #[error(
        "{dir} has {free} of the {needed} bytes needed for shared memory: raise it to at least {needed} bytes \
         (Kubernetes: mount a volume `emptyDir: {{medium: Memory, sizeLimit: ...}}` at {dir}; Docker: `--shm-size`)",
        dir = dir.display()
    )]
    NoSpace { needed: u64, free: u64, dir: PathBuf },
    #[error("{} is not a segment of this user: {problem}", path.display())]
    NotOurs { path: PathBuf, problem: String },
    #[error("{} has a bad header: {problem}", path.display())]
    BadHeader { path: PathBuf, problem: HeaderProblem },
    #[error(transparent)]
    BadShape(#[from] OutOfRange),
    #[error("group name {name:?}: allowed are 1 to 64 of A-Z a-z 0-9 - _")]
    BadName { name: String },
    #[error("{} exists: a group of this name and epoch is alive, or sweep_orphans has not run", path.display())]
    Exists { path: PathBuf },
    #[error("{party} has joined this segment before")]
    RankTaken { party: Party },
    #[error("rank {rank} of a group of {world_size}")]
    NoSuchRank { rank: u32, world_size: u32 },
    #[error("only rank 0 publishes outputs, this is rank {rank}")]
    NotRankZero { rank: u32 },
    #[error("not joined within {limit:?}: {}", names(missing))]
    NotJoined { missing: Vec<Party>, limit: Duration },
    #[error("the group was aborted: {reason}")]
    Aborted { reason: AbortReason },
    #[error("{party} did not {awaited} within {limit:?}")]
    TimedOut {
        party: Party,
        awaited: Awaited,
        limit: Duration,
    },
    /// A message of `party` is not the one expected. The group has been aborted with [`AbortReason::OutOfStep`].
    #[error("unexpected bytes from {party}: {problem}")]
    Corrupt { party: Party, problem: Corruption },
    #[error("a message of {len} bytes, the limit is {limit}")]
    TooLong { len: u64, limit: u64 },
    /// Buffers of one call whose lengths do not belong together; counted in elements.
    #[error("a result of {found} elements, {expected} needed")]
    WrongLength { found: usize, expected: usize },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl ShmError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

fn names(parties: &[Party]) -> String {
    parties
        .iter()
        .map(Party::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reasons_survive_the_word() {
        let parties = [Party::Engine, Party::Rank(0), Party::Rank(29)];
        let with_party = parties.into_iter().flat_map(|party| {
            [
                AbortReason::TimedOut(party),
                AbortReason::Lost(party),
                AbortReason::OutOfStep(party),
            ]
        });
        let plain = [
            AbortReason::Shutdown,
            AbortReason::CreatorGone,
            AbortReason::Other(0),
            AbortReason::Other(u16::MAX),
        ];
        for reason in with_party.chain(plain) {
            assert_ne!(reason.code(), 0);
            assert_eq!(AbortReason::from_code(reason.code()), Some(reason));
        }
        assert_eq!(AbortReason::from_code(0), None);
    }

    proptest! {
        #[test]
        fn any_word_but_zero_is_a_reason(code in 1u32..) {
            prop_assert!(AbortReason::from_code(code).is_some());
        }
    }

    #[test]
    fn no_space_says_what_to_do() {
        let error = ShmError::NoSpace {
            needed: 25_165_824,
            free: 65_536,
            dir: "/dev/shm".into(),
        };
        let text = error.to_string();
        for part in [
            "25165824",
            "65536",
            "/dev/shm",
            "emptyDir",
            "medium: Memory",
            "--shm-size",
        ] {
            assert!(text.contains(part), "{part} is missing in: {text}");
        }
    }

    #[test]
    fn a_timeout_names_the_party_and_the_barrier() {
        let error = ShmError::TimedOut {
            party: Party::Rank(2),
            awaited: Awaited::Barrier(17),
            limit: Duration::from_secs(10),
        };
        assert_eq!(error.to_string(), "rank 2 did not reach barrier #17 within 10s");
    }
}

//! Gathers of large values without a slot in between: each rank reads its peers' memory (`process_vm_readv`, Linux 3.2).
//!
//! Through slots a value is copied three times (into its writer's slot, and out of it and beside it into the results);
//! read directly, two times. Whether the kernel lets a process read another's memory depends on the user, on Yama's
//! `ptrace_scope`, on seccomp, and on the pid namespace in which a pid is looked up. So ranks try it, once, on a random
//! number of each other's, and gather directly only if all of them can.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io;

use crate::collective::{Element, bytes_of, bytes_of_mut};
use crate::error::{AbortReason, Party, ShmError};
use crate::rank_port::RankPort;
use crate::slot::Stamp;
use crate::stream;

/// Kinds of messages, beside those of `collective`.
const PROBE: u32 = 32;
const VERDICT: u32 = 33;
/// A pid, an address, and the number that lies there.
const PROBE_BYTES: usize = 3 * size_of::<u64>();
/// Set in the kind of a collective that is direct.
const DIRECT: u32 = 1 << 7;

/// From here on the second barrier and the system calls cost less than the copy that they save.
const LEAST_BYTES: usize = 512 << 10;

/// What is known of reading the peers' memory.
#[derive(Debug)]
pub(crate) enum Peers {
    NotAsked,
    /// At least one rank cannot read another's.
    OutOfReach,
    /// All can. Their pids, by rank.
    InReach(Vec<u32>),
}

/// Memory of a process, from an address on.
#[derive(Clone, Copy, Debug)]
struct Remote {
    pid: u32,
    address: u64,
}

impl Remote {
    /// Fills `out`.
    fn read(self, mut out: &mut [u8]) -> io::Result<()> {
        let mut address = self.address;
        while !out.is_empty() {
            let local = libc::iovec {
                iov_base: out.as_mut_ptr().cast(),
                iov_len: out.len(),
            };
            let remote = libc::iovec {
                iov_base: std::ptr::without_provenance_mut(address as usize),
                iov_len: out.len(),
            };
            // SAFETY: the kernel writes at most `out.len()` bytes to `out`, and reports an address that the other
            // process does not have.
            let read = unsafe {
                libc::process_vm_readv(self.pid as i32, &raw const local, 1, &raw const remote, 1, 0)
            };
            let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            out = &mut out[read..];
            address += read as u64;
        }
        Ok(())
    }
}

impl RankPort {
    /// Whether ranks that each give `bytes` gather them directly: the same on all of them.
    pub(crate) fn gathers_directly(&mut self, bytes: usize) -> Result<bool, ShmError> {
        if bytes < LEAST_BYTES || self.segment.layout().messages.capacity < PROBE_BYTES {
            return Ok(false);
        }
        if matches!(self.peers, Peers::NotAsked) {
            self.peers = self.probe_peers()?;
        }
        Ok(matches!(self.peers, Peers::InReach(_)))
    }

    /// Two rounds: a number to be read, and what came of it.
    fn probe_peers(&mut self) -> Result<Peers, ShmError> {
        // On the heap, so that it lies where values lie.
        let number = Box::new(RandomState::new().hash_one(self.rank));
        let address = (&raw const *number).addr() as u64;
        let words = [std::process::id().into(), address, *number];
        let stamp = self.round(PROBE, 0, words.map(u64::to_ne_bytes).as_flattened())?;
        let (mut pids, mut readable) = (Vec::new(), true);
        for rank in 0..self.world_size {
            let [pid, address, number] = self.words(rank, stamp)?;
            // No process has the last number, should a peer's not be one.
            let pid = u32::try_from(pid).unwrap_or(u32::MAX);
            let mut found = [0; 8];
            let read = Remote { pid, address }.read(&mut found);
            readable &= read.is_ok() && u64::from_ne_bytes(found) == number;
            pids.push(pid);
        }
        let stamp = self.round(VERDICT, 0, &[readable.into()])?;
        for rank in 0..self.world_size {
            readable &= self.message(rank, stamp)? == [1];
        }
        Ok(if readable {
            Peers::InReach(pids)
        } else {
            Peers::OutOfReach
        })
    }

    /// As [`RankPort::all_gather`] and [`RankPort::gather`], of values that lie in the ranks' own memory until all have
    /// read them.
    pub(crate) fn gather_directly<T: Element>(
        &mut self,
        kind: u32,
        mine: &[T],
        out: Option<&mut [T]>,
    ) -> Result<(), ShmError> {
        let address = mine.as_ptr().addr() as u64;
        let stamp = self.round(kind | DIRECT, size_of_val(mine), &address.to_ne_bytes())?;
        if let Some(out) = out {
            self.read_peers(stamp, mine, out)?;
        }
        // Nobody reads `mine` any more.
        self.barrier()
    }

    fn read_peers<T: Element>(&self, stamp: Stamp, mine: &[T], out: &mut [T]) -> Result<(), ShmError> {
        let Peers::InReach(pids) = &self.peers else {
            unreachable!("asked before");
        };
        let place = |rank: u32| rank as usize * mine.len()..(rank as usize + 1) * mine.len();
        // While it is in this core's cache, and while the peers do the same.
        stream::copy(bytes_of(mine), bytes_of_mut(&mut out[place(self.rank)]));
        for rank in (1..self.world_size).map(|i| (self.rank + i) % self.world_size) {
            let [address] = self.words(rank, stamp)?;
            let values = Remote {
                pid: pids[rank as usize],
                address,
            };
            if values.read(bytes_of_mut(&mut out[place(rank)])).is_err() {
                // It could be read before.
                self.segment.abort(AbortReason::Lost(Party::Rank(rank)));
                return Err(self.segment.aborted());
            }
        }
        Ok(())
    }

    /// A rank's message of `N` numbers.
    fn words<const N: usize>(&self, rank: u32, stamp: Stamp) -> Result<[u64; N], ShmError> {
        let message = self.message_of_length(rank, stamp, N * size_of::<u64>())?;
        Ok(std::array::from_fn(|i| {
            u64::from_ne_bytes(message.as_chunks().0[i])
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn memory_is_read_or_refused() {
        let values: Vec<u8> = (0..100_000).map(|i| (i % 251) as u8).collect();
        let here = Remote {
            pid: std::process::id(),
            address: values.as_ptr().addr() as u64,
        };
        let mut found = vec![0; values.len()];
        here.read(&mut found).unwrap();
        assert_eq!(found, values);

        let mut error = |remote: Remote| remote.read(&mut found).unwrap_err().raw_os_error();
        assert_eq!(error(Remote { address: 8, ..here }), Some(libc::EFAULT));
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        for pid in [child.id(), u32::MAX] {
            assert_eq!(error(Remote { pid, ..here }), Some(libc::ESRCH), "{pid}");
        }
    }
}

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
/// Set in the kind of a collective that is direct.
pub(crate) const DIRECT: u32 = 1 << 7;

/// From here on the second barrier and the system calls cost less than the copy that they save.
const LEAST_BYTES: usize = 512 << 10;

/// What a rank tells the others of memory that they may read.
#[derive(Clone, Copy, Debug)]
struct Offer {
    pid: u32,
    address: u64,
    /// Of a probe: what is to be found there.
    number: u64,
}

impl Offer {
    const BYTES: usize = 24;

    /// Of memory of this process.
    fn new<T>(of: *const T, number: u64) -> Self {
        Self {
            pid: std::process::id(),
            address: of.addr() as u64,
            number,
        }
    }

    fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let words = [self.pid.into(), self.address, self.number];
        for (to, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
            *to = u64::to_ne_bytes(word);
        }
        bytes
    }

    fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |i: usize| u64::from_ne_bytes(bytes.as_chunks().0[i]);
        Self {
            pid: word(0) as u32,
            address: word(1),
            number: word(2),
        }
    }

    /// Fills `out` from the offered memory on.
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
        if bytes < LEAST_BYTES || self.segment.layout().messages.capacity < Offer::BYTES {
            return Ok(false);
        }
        if let Some(readable) = self.peers_readable {
            return Ok(readable);
        }
        let readable = self.probe_peers()?;
        self.peers_readable = Some(readable);
        Ok(readable)
    }

    /// Whether every rank can read every other's memory. Two rounds.
    fn probe_peers(&mut self) -> Result<bool, ShmError> {
        // On the heap, so that it lies where values lie.
        let number = Box::new(RandomState::new().hash_one(self.rank));
        let offer = Offer::new(&raw const *number, *number);
        let stamp = self.round(PROBE, 0, &offer.encode())?;
        let mut readable = true;
        for rank in 0..self.world_size {
            let offer = self.offer(rank, stamp)?;
            let mut found = [0; 8];
            readable &= offer.read(&mut found).is_ok() && u64::from_ne_bytes(found) == offer.number;
        }
        let stamp = self.round(VERDICT, 0, &[readable.into()])?;
        for rank in 0..self.world_size {
            readable &= self.message(rank, stamp)? == [1];
        }
        Ok(readable)
    }

    /// As [`RankPort::all_gather`] and [`RankPort::gather`], of values that lie in the ranks' own memory until all have
    /// read them.
    pub(crate) fn gather_directly<T: Element>(
        &mut self,
        kind: u32,
        mine: &[T],
        out: Option<&mut [T]>,
    ) -> Result<(), ShmError> {
        let offer = Offer::new(mine.as_ptr(), 0);
        let stamp = self.round(kind | DIRECT, size_of_val(mine), &offer.encode())?;
        if let Some(out) = out {
            self.read_offers(stamp, mine, out)?;
        }
        // Nobody reads `mine` any more.
        self.barrier()
    }

    fn read_offers<T: Element>(&self, stamp: Stamp, mine: &[T], out: &mut [T]) -> Result<(), ShmError> {
        let place = |rank: u32| rank as usize * mine.len()..(rank as usize + 1) * mine.len();
        // While it is in this core's cache, and while the peers do the same.
        stream::copy(bytes_of(mine), bytes_of_mut(&mut out[place(self.rank)]));
        for rank in (1..self.world_size).map(|i| (self.rank + i) % self.world_size) {
            let offer = self.offer(rank, stamp)?;
            if offer.read(bytes_of_mut(&mut out[place(rank)])).is_err() {
                // It could be read before.
                self.segment.abort(AbortReason::Lost(Party::Rank(rank)));
                return Err(self.segment.aborted());
            }
        }
        Ok(())
    }

    fn offer(&self, rank: u32, stamp: Stamp) -> Result<Offer, ShmError> {
        let message = self.message_of_length(rank, stamp, Offer::BYTES)?;
        Ok(Offer::decode(
            message.first_chunk().expect("the length was checked"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn an_offer_is_read_or_refused() {
        let values: Vec<u8> = (0..100_000).map(|i| (i % 251) as u8).collect();
        let offer = Offer::decode(&Offer::new(values.as_ptr(), 7).encode());
        assert_eq!((offer.pid, offer.number), (std::process::id(), 7));
        let mut found = vec![0; values.len()];
        offer.read(&mut found).unwrap();
        assert_eq!(found, values);

        let nowhere = Offer { address: 8, ..offer };
        assert_eq!(
            nowhere.read(&mut found).unwrap_err().raw_os_error(),
            Some(libc::EFAULT)
        );

        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let nobody = Offer {
            pid: child.id(),
            ..offer
        };
        assert_eq!(
            nobody.read(&mut found).unwrap_err().raw_os_error(),
            Some(libc::ESRCH)
        );
    }
}

//! Short sums without NCCL: every rank reads the values of all others out of their devices' memory, in one kernel.
//!
//! NCCL's rings and trees cost several hops, whatever the length. In a step with few tokens a layer's two sums are a few
//! KiB, so the hops are most of what they take. The ranks open each other's staging memory (CUDA IPC) once, when they
//! join; a sum is then a copy into the own staging memory, a flag in each peer's, and a read of all. Ranks add in rank
//! order, so all get the same bits. The way of vLLM's and TensorRT-LLM's custom all-reduce.
//!
//! The kernel waits for its peers in a loop, which nothing outside can end; so it looks at a word in host memory that is
//! set when the communicator is aborted.

use std::sync::Arc;

use phalanx_shm::{RankPort, ShmError};

use crate::cuda::{
    Arg, CudaBackend, CudaBuffer, Device, Grid, HANDLE_BYTES, HostFlag, Kernels, OpenedMemory, Peers,
    SharedMemory, bus_id, check_peer_access,
};
use crate::{KernelError, Result};

const KERNEL: &str = "one_shot_all_reduce";
const VALUE: usize = size_of::<f32>();
/// Values that a thread loads at once; sums of other lengths are NCCL's.
const VECTOR: usize = 4;
const THREADS: usize = 256;
/// `MAX_BLOCKS` of `all_reduce.cu`.
const MAX_BLOCKS: usize = 64;
/// `VECTORS_PER_THREAD` of `all_reduce.cu`.
const VECTORS_PER_THREAD: usize = 4;
/// Why a rank cannot take part, in a message to its peers.
const MAX_REASON_BYTES: usize = 512;

/// The longest message in bytes: beyond it a rank would read more than NCCL moves, `ranks - 1` times the message. Never
/// more than [`Peers::MAX`] ranks.
fn limit_bytes(ranks: usize) -> usize {
    match ranks {
        0..=2 => 512 << 10,
        3..=Peers::MAX => 256 << 10,
        _ => 0,
    }
}

/// How a group's memory is laid out, the same on all ranks.
#[derive(Clone, Copy)]
struct Shape {
    ranks: usize,
    /// The longest message in values.
    capacity: usize,
}

impl Shape {
    fn new(ranks: usize) -> Self {
        Self {
            ranks,
            capacity: limit_bytes(ranks) / VALUE,
        }
    }

    /// Of the longest message.
    fn most_blocks(self) -> usize {
        self.capacity / (VECTOR * THREADS * VECTORS_PER_THREAD)
    }

    /// Those that have work.
    fn blocks(self, count: usize) -> usize {
        count.div_ceil(VECTOR * THREADS).min(self.most_blocks())
    }

    /// Offset of the flags, behind both halves of the staging memory.
    fn flags(self) -> usize {
        2 * self.capacity * VALUE
    }

    /// Offset of the blocks' own counts.
    fn epochs(self) -> usize {
        self.flags() + MAX_BLOCKS * Peers::MAX * size_of::<u32>()
    }

    fn bytes(self) -> usize {
        self.epochs() + MAX_BLOCKS * size_of::<u32>()
    }

    fn takes(self, count: usize) -> bool {
        count <= self.capacity && count.is_multiple_of(VECTOR)
    }
}

/// One rank's end.
pub(super) struct OneShot {
    device: Device,
    kernels: Arc<Kernels>,
    shape: Shape,
    rank: usize,
    peers: Peers,
    given_up: Arc<HostFlag>,
    /// Before the rank's own memory: mappings are closed first.
    _opened: Vec<OpenedMemory>,
    own: SharedMemory,
}

/// Why sums go through NCCL, in words.
pub(super) type Unavailable = String;

impl OneShot {
    /// Agrees with the other ranks, all of which call this, whether they can do it. They exchange two messages.
    ///
    /// # Errors
    /// [`KernelError::Collective`] if the group ends meanwhile. That some rank cannot is no error.
    pub(super) fn join(backend: &CudaBackend, port: &mut RankPort) -> Result<Result<Self, Unavailable>> {
        let (rank, ranks) = (port.rank() as usize, port.world_size() as usize);
        if limit_bytes(ranks) == 0 {
            return Ok(Err(format!("{ranks} ranks, at most {} can", Peers::MAX)));
        }
        let own = Offer::make(&backend.device, Shape::new(ranks));
        let message = own.as_ref().map_or_else(refusal, Offer::encode);
        let offers = port.exchange(&message).map_err(ended)?;
        let peers = match decode(&offers) {
            Ok(peers) => peers,
            Err(reason) => return Ok(Err(reason)),
        };
        // Whoever has none has refused, and all have heard it.
        let Ok(own) = own else {
            return Ok(Err("this rank has no memory to share".to_owned()));
        };
        let opened = own.open(backend, rank, &peers);
        let verdict = opened.as_ref().err().map(refusal).unwrap_or_default();
        let verdicts = port.exchange(&verdict).map_err(ended)?;
        let refused = verdicts.iter().position(|verdict| !verdict.is_empty());
        Ok(match (opened, refused) {
            (Ok(opened), None) => Ok(opened),
            (_, Some(rank)) => Err(format!("rank {rank}: {}", reason(&verdicts[rank]))),
            (Err(error), None) => Err(error.to_string()),
        })
    }

    /// To be set when the group is over.
    pub(super) fn given_up(&self) -> Arc<HostFlag> {
        Arc::clone(&self.given_up)
    }

    /// The longest message in bytes.
    pub(super) fn limit_bytes(&self) -> usize {
        self.shape.capacity * VALUE
    }

    /// Whether so many values are summed here; the same on all ranks.
    pub(super) fn takes(&self, count: usize) -> bool {
        self.shape.takes(count)
    }

    /// Puts the sum over the ranks of the first `count` values into the stream. They are as many as it
    /// [takes](Self::takes), and in the buffer.
    pub(super) fn enqueue(&self, buffer: &CudaBuffer, count: usize) -> Result<()> {
        let grid = Grid::new([self.shape.blocks(count), 1, 1], THREADS as u32);
        let args = [
            Arg::Pointer(buffer.ptr()),
            Arg::Peers(&self.peers),
            Arg::Pointer(self.own.ptr() + self.shape.epochs() as u64),
            Arg::Pointer(self.given_up.ptr()),
            Arg::U32(self.rank as u32),
            Arg::U32(self.shape.ranks as u32),
            Arg::U32(count as u32),
            Arg::U32(self.shape.capacity as u32),
        ];
        // SAFETY: these are the kernel's parameters. The buffer holds `count` values (`NcclCommunicator::sum`), the
        // ranks' memory and the flag are as large as `Shape` says, and all of it lives until the stream is done: this
        // value waits for it in `drop`, and so does the backend's memory.
        unsafe { self.kernels.launch(&self.device, KERNEL, grid, &args) }
    }
}

impl Drop for OneShot {
    fn drop(&mut self) {
        // The communicator has been aborted by now, so nothing that waits in the stream waits for ever. What has failed
        // has also ended.
        self.given_up.set();
        let _ = self.device.synchronize(KERNEL);
    }
}

/// Memory that a rank has made and its peers are to open.
struct Offer {
    shape: Shape,
    own: SharedMemory,
    handle: [u8; HANDLE_BYTES],
    bus_id: String,
}

/// An offer as a peer sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Peer {
    handle: [u8; HANDLE_BYTES],
    bus_id: String,
}

/// First byte of a message with an offer.
const OFFERED: u8 = 1;
/// First byte of one with a reason.
const REFUSED: u8 = 0;

impl Offer {
    fn make(device: &Device, shape: Shape) -> Result<Self> {
        let own = SharedMemory::new(device, "one-shot all-reduce", shape.bytes())?;
        Ok(Self {
            shape,
            handle: own.handle()?,
            bus_id: bus_id(device)?,
            own,
        })
    }

    fn encode(&self) -> Vec<u8> {
        [&[OFFERED][..], &self.handle, self.bus_id.as_bytes()].concat()
    }

    fn open(self, backend: &CudaBackend, rank: usize, peers: &[Peer]) -> Result<OneShot> {
        let (device, shape) = (backend.device.same(), self.shape);
        let mut addresses = Peers::default();
        let mut opened = Vec::new();
        for (place, peer) in peers.iter().enumerate() {
            let start = if place == rank {
                self.own.ptr()
            } else {
                check_peer_access(&device, &peer.bus_id)?;
                let memory = OpenedMemory::open(&device, peer.handle)?;
                let start = memory.ptr();
                opened.push(memory);
                start
            };
            addresses.staging[place] = start;
            addresses.flags[place] = start + shape.flags() as u64;
        }
        Ok(OneShot {
            given_up: Arc::new(HostFlag::new(&device)?),
            kernels: backend.plain_kernels(),
            device,
            shape,
            rank,
            peers: addresses,
            _opened: opened,
            own: self.own,
        })
    }
}

/// The offers of all ranks, or why there is one missing.
fn decode(messages: &[Vec<u8>]) -> Result<Vec<Peer>, Unavailable> {
    let offers = messages.iter().enumerate().map(|(rank, message)| {
        let offer = match message.split_first() {
            Some((&OFFERED, rest)) => rest.split_first_chunk::<HANDLE_BYTES>(),
            _ => return Err(format!("rank {rank}: {}", reason(message))),
        };
        let (handle, bus_id) = offer.ok_or_else(|| format!("rank {rank} offers {} bytes", message.len()))?;
        Ok(Peer {
            handle: *handle,
            bus_id: String::from_utf8_lossy(bus_id).into_owned(),
        })
    });
    offers.collect()
}

fn refusal(error: &KernelError) -> Vec<u8> {
    let text = error.to_string();
    let text = &text.as_bytes()[..text.len().min(MAX_REASON_BYTES)];
    [&[REFUSED], text].concat()
}

/// The text of a refusal. It comes from a peer, so it may be anything.
fn reason(message: &[u8]) -> String {
    String::from_utf8_lossy(message.get(1..).unwrap_or_default()).into_owned()
}

fn ended(error: ShmError) -> KernelError {
    KernelError::Collective(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_has_work_in_the_longest_message_and_all_blocks_exist() {
        for ranks in 2..=Peers::MAX {
            let shape = Shape::new(ranks);
            assert!((1..=MAX_BLOCKS).contains(&shape.most_blocks()));
            assert_eq!(
                shape.most_blocks() * THREADS * VECTOR * VECTORS_PER_THREAD,
                shape.capacity
            );
            assert_eq!(shape.blocks(shape.capacity), shape.most_blocks());
            assert_eq!([0, 4, 1024, 1028].map(|count| shape.blocks(count)), [0, 1, 1, 2]);
            assert!(shape.takes(shape.capacity) && shape.takes(0));
            assert!(!shape.takes(shape.capacity + VECTOR) && !shape.takes(VECTOR + 1));
        }
        assert_eq!(limit_bytes(Peers::MAX + 1), 0);
    }

    #[test]
    fn offers_survive_the_message_and_anything_else_is_a_reason() {
        let offer = |tail: &[u8]| [&[OFFERED][..], &[7; HANDLE_BYTES], tail].concat();
        let peers = decode(&[offer(b"0000:17:00.0"), offer(b"")]).expect("two offers");
        assert_eq!(
            (peers[0].bus_id.as_str(), peers[1].handle),
            ("0000:17:00.0", [7; HANDLE_BYTES])
        );
        let refused = refusal(&KernelError::Collective("no memory".to_owned()));
        assert_eq!(
            decode(&[offer(b""), refused]).unwrap_err(),
            "rank 1: collective failed: no memory"
        );
        assert_eq!(
            decode(&[vec![OFFERED, 2, 3]]).unwrap_err(),
            "rank 0 offers 3 bytes"
        );
        assert_eq!(decode(&[Vec::new()]).unwrap_err(), "rank 0: ");
    }
}

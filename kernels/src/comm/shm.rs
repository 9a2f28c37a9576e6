//! CPU ranks of one host, over `/dev/shm`.

use std::cell::RefCell;
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

use phalanx_model::TensorParallelStyle;
use phalanx_shm::{AbortReason, RankPort, Segment, ShmError};

use super::layout::check_layout;
use crate::cpu::{CpuBackend, CpuBuffer};
use crate::{Backend, Communicator, GatherLayout, KernelError, Result};

/// Collectives of one rank.
///
/// In gather style the ranks' buffers are one memory, the segment's arena: a rank writes its own part in place, and
/// [`all_gather`](Communicator::all_gather) is a barrier. In reduce style a rank's buffers hold partial sums and are its
/// own; [`all_reduce`](Communicator::all_reduce) adds them in rank order, through the segment's message slots.
pub struct ShmCommunicator {
    /// The worker reads plans from the same port.
    port: Rc<RefCell<RankPort>>,
    segment: Arc<Segment>,
    style: TensorParallelStyle,
    rank: usize,
    world_size: usize,
    /// Bytes of the arena in use.
    used: usize,
}

/// Where the next buffer goes when `used` bytes are taken.
fn place(used: usize, rows: usize, width: usize) -> Result<Range<usize>> {
    let bytes = phalanx_model::memory::arena_bytes(rows, width);
    bytes
        .and_then(|bytes| used.checked_add(bytes))
        .map(|end| used..end)
        .ok_or(KernelError::OutOfMemory {
            what: "shared activations",
            requested: usize::MAX,
            free: 0,
        })
}

fn failed(error: ShmError) -> KernelError {
    KernelError::Collective(error.to_string())
}

impl ShmCommunicator {
    /// All ranks of a group pass the same style.
    pub fn new(port: Rc<RefCell<RankPort>>, style: TensorParallelStyle) -> Self {
        let (segment, rank, world_size) = {
            let port = port.borrow();
            (
                Arc::clone(port.segment()),
                port.rank() as usize,
                port.world_size() as usize,
            )
        };
        Self {
            port,
            segment,
            style,
            rank,
            world_size,
            used: 0,
        }
    }

    /// Collects the ranks' parts of a buffer of this rank's own. Parts are padded to the longest.
    fn gather_private(&self, buffer: &mut CpuBuffer, rows: usize, layout: GatherLayout<'_>) -> Result<()> {
        let width = buffer.width();
        let parts: Vec<_> = (0..self.world_size)
            .map(|rank| parts(layout, rank, rows, width))
            .collect();
        let lengths = parts
            .iter()
            .map(|parts| parts.iter().map(Range::len).sum::<usize>());
        let longest = lengths.max().unwrap_or(0);

        let mut mine = Vec::with_capacity(longest);
        for part in &parts[self.rank] {
            mine.extend_from_slice(&buffer.values()[part.clone()]);
        }
        mine.resize(longest, 0.0f32);
        let mut all = vec![0.0; longest * self.world_size];
        self.port
            .borrow_mut()
            .all_gather(&mine, &mut all)
            .map_err(failed)?;

        let values = buffer.values_mut();
        for (parts, mut from) in parts.into_iter().zip(all.chunks_exact(longest.max(1))) {
            for part in parts {
                let (head, rest) = from.split_at(part.len());
                values[part].copy_from_slice(head);
                from = rest;
            }
        }
        Ok(())
    }
}

/// The values of a buffer that `rank` has written.
fn parts(layout: GatherLayout<'_>, rank: usize, rows: usize, width: usize) -> Vec<Range<usize>> {
    let starts = (0..rows).map(|row| row * width);
    match layout {
        GatherLayout::Columns(ranges) => starts
            .map(|start| start + ranges[rank].start..start + ranges[rank].end)
            .collect(),
        GatherLayout::Rows(writers) => starts
            .zip(writers)
            .filter(|&(_, &writer)| writer as usize == rank)
            .map(|(start, _)| start..start + width)
            .collect(),
    }
}

impl Communicator<CpuBackend> for ShmCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn buffer(&mut self, backend: &CpuBackend, rows: usize, width: usize) -> Result<CpuBuffer> {
        if self.style == TensorParallelStyle::Reduce {
            return backend.buffer(rows, width);
        }
        let arena = self.port.borrow().arena();
        let place = place(self.used, rows, width)?;
        if place.end > arena.len() {
            return Err(KernelError::OutOfMemory {
                what: "shared activations",
                requested: place.len(),
                free: arena.len() - self.used,
            });
        }
        let start: NonNull<u8> = arena.as_ptr();
        self.used = place.end;
        // SAFETY: the place lies within the arena, on a multiple of 128 bytes from its page-aligned start, and nothing
        // else of this process was given it; the arena stays mapped while the handle lives. Who writes what is the
        // contract of `all_gather`.
        unsafe {
            Ok(CpuBuffer::shared(
                start.add(place.start).cast(),
                rows,
                width,
                Arc::new(arena),
            ))
        }
    }

    fn all_gather(&mut self, buffer: &mut CpuBuffer, rows: usize, layout: GatherLayout<'_>) -> Result<()> {
        buffer.check("all_gather", rows, buffer.width())?;
        check_layout(layout, self.world_size, rows, buffer.width())?;
        if buffer.is_shared() {
            return self.port.borrow_mut().barrier().map_err(failed);
        }
        self.gather_private(buffer, rows, layout)
    }

    fn all_reduce(&mut self, buffer: &mut CpuBuffer, rows: usize) -> Result<()> {
        buffer.check("all_reduce", rows, buffer.width())?;
        if buffer.is_shared() {
            let message = "a buffer in gather style holds one sum, not one per rank".to_owned();
            return Err(KernelError::Shape {
                op: "all_reduce",
                message,
            });
        }
        let len = rows * buffer.width();
        self.port
            .borrow_mut()
            .all_reduce(&mut buffer.values_mut()[..len])
            .map_err(failed)
    }

    fn exchange(&mut self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.port.borrow_mut().exchange(message).map_err(failed)
    }

    fn abort(&self) {
        self.segment
            .abort(AbortReason::Lost(phalanx_shm::Party::Rank(self.rank as u32)));
    }
}

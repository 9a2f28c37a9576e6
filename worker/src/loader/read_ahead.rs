//! Keeps the disks a little ahead of the loader.

use std::{collections::VecDeque, ops::Range};

use phalanx_shm::MappedFile;

/// Bytes that are asked for ahead: enough for several files and requests in flight, little beside a host's memory. They
/// lie in the page cache, which the kernel may take back at any time.
const WINDOW: u64 = 256 << 20;

/// Spans of files in about the order in which they will be read.
#[derive(Default)]
pub(super) struct ReadAhead {
    waiting: VecDeque<Span>,
    /// Of those that have been asked for, bytes.
    asked: u64,
}

struct Span {
    file: usize,
    bytes: Range<usize>,
    /// Of the span, as many are read.
    read: u64,
}

impl ReadAhead {
    pub(super) fn plan(&mut self, file: usize, bytes: Range<usize>, read: u64) {
        self.waiting.push_back(Span { file, bytes, read });
    }

    /// Asks for what comes within the window when `done` bytes have been read.
    pub(super) fn advance(&mut self, files: &[MappedFile], done: u64) {
        while let Some(span) = self.next(done) {
            if let Some(file) = files.get(span.file) {
                file.will_need(span.bytes);
            }
        }
    }

    fn next(&mut self, done: u64) -> Option<Span> {
        if self.asked >= done.saturating_add(WINDOW) {
            return None;
        }
        let span = self.waiting.pop_front()?;
        self.asked += span.read;
        Some(span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_moves_with_what_has_been_read() {
        let mut ahead = ReadAhead::default();
        let tensor = 100 << 20;
        for at in 0..6 {
            ahead.plan(at / 2, 0..tensor, tensor as u64);
        }
        let mut files = |done| -> Vec<usize> {
            std::iter::from_fn(|| ahead.next(done))
                .map(|span| span.file)
                .collect()
        };
        assert_eq!(files(0), [0, 0, 1], "the window's end lies within the third");
        assert_eq!(files(0), [0; 0]);
        assert_eq!(files(tensor as u64), [1]);
        assert_eq!(files(u64::MAX), [2, 2]);
        assert_eq!(files(u64::MAX), [0; 0]);
    }
}

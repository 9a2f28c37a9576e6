//! Counts of values that reach a threshold, equal values among them.

use super::random::Random;
use super::{THREADS, Tolerances, filled};
use crate::{Backend, Threshold};

pub fn counts_are_exact<B: Backend>(make: &impl Fn(usize) -> B, _: &Tolerances) {
    let mut random = Random::new(41);
    // The last columns are not the op's: they would count.
    let (rows, columns, width) = (5, 3001, 3009);
    let mut values: Vec<f32> = (0..rows * width)
        .map(|_| (random.normal() * 16.0).round() / 4.0)
        .collect();
    for row in values.chunks_mut(width) {
        row[columns..].fill(f32::MAX);
    }
    let thresholds: Vec<Threshold> = (0..40)
        .map(|i| Threshold {
            row: i % rows,
            value: match i {
                0 => f32::NEG_INFINITY,
                1 => f32::INFINITY,
                _ => values[random.below(rows * width)],
            },
        })
        .collect();
    let want: Vec<u32> = thresholds
        .iter()
        .map(|threshold| {
            let row = &values[threshold.row * width..][..columns];
            row.iter().filter(|&&value| value >= threshold.value).count() as u32
        })
        .collect();
    for threads in THREADS {
        let backend = make(threads);
        let buffer = filled(&backend, &values, width, 1);
        let counts = backend.count_at_least(&buffer, columns, &thresholds).unwrap();
        assert_eq!(counts, want);
        let none = backend.count_at_least(&buffer, columns, &[]).unwrap();
        assert!(none.is_empty());
        let beyond = [Threshold {
            row: rows + 1,
            value: 0.0,
        }];
        assert!(backend.count_at_least(&buffer, columns, &beyond).is_err());
    }
}

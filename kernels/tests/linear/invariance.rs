//! The same bits whatever the batch, the threads, the shard and the instruction set.

use phalanx_kernels::cpu::linear::Isa;
use phalanx_model::TensorFormat;
use proptest::prelude::*;

use super::support::*;

#[test]
fn bits_do_not_depend_on_the_batch_or_the_threads() {
    let mut rng = Noise(4);
    for format in TensorFormat::ALL {
        for (n, blocks) in [(8, 3), (37, 5), (136, 18)] {
            let k = cols(format, blocks);
            let packed = Matrix::random(format, n, k, &mut rng).pack();
            let x = rng.activations(64 * k);
            let all = bits(&multiply(&packed, &x, Isa::detect(), 1));
            for threads in [1, 2, 3] {
                for m in [1, 2, 3, 5, 8, 13, 64] {
                    for start in (0..=64 - m).step_by(m.max(7)) {
                        let y = multiply(&packed, &x[start * k..(start + m) * k], Isa::detect(), threads);
                        let context = format!("{format:?} {n} x {k}: rows {start}..+{m}, {threads} threads");
                        assert!(bits(&y) == all[start * n..(start + m) * n], "{context}");
                    }
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_shard_or_the_stack() {
    let mut rng = Noise(5);
    for format in TensorFormat::ALL {
        let (n, k, m) = (43, cols(format, 5), 9);
        let matrix = Matrix::random(format, n, k, &mut rng);
        let x = rng.activations(m * k);
        let whole = multiply(&matrix.pack(), &x, Isa::detect(), 2);
        let other = Matrix::random(TensorFormat::F32, 5, k, &mut rng);
        for (start, end) in [(0, 1), (1, 2), (3, 20), (7, 43), (42, 43), (0, 43), (9, 9)] {
            let shard = pack(&[other.source(0..5), matrix.source(start..end), other.source(0..0)]);
            assert_eq!(shard.rows(), 5 + end - start);
            let y = multiply(&shard, &x, Isa::detect(), 2);
            for row in 0..m {
                let got = &y[row * shard.rows()..][5..shard.rows()];
                assert_eq!(
                    bits(got),
                    bits(&whole[row * n + start..row * n + end]),
                    "{format:?} {start}..{end}"
                );
            }
        }
    }
}

#[test]
fn portable_kernels_give_the_same_bits() {
    let mut rng = Noise(6);
    for format in TensorFormat::ALL {
        for (m, n, blocks) in [(1, 24, 3), (5, 37, 9), (19, 16, 40)] {
            let k = cols(format, blocks);
            let packed = Matrix::random(format, n, k, &mut rng).pack();
            let x = rng.activations(m * k);
            let portable = multiply(&packed, &x, Isa::PORTABLE, 2);
            for isa in Isa::available() {
                let fast = multiply(&packed, &x, isa, 2);
                assert_eq!(bits(&fast), bits(&portable), "{format:?} {m} x {n} x {k} {isa:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any stack, any shape, any threads: the bits that the portable kernels give for each part and row alone.
    #[test]
    fn any_shape_has_the_bits_of_its_rows(
        formats in prop::collection::vec((0..TensorFormat::ALL.len(), 0..30usize), 1..4),
        blocks in 1..20usize,
        m in 1..20usize,
        threads in 1..4usize,
        seed in 1..u64::MAX,
    ) {
        let mut rng = Noise(seed);
        let parts: Vec<_> = formats.iter().map(|&(f, n)| (TensorFormat::ALL[f], n)).collect();
        let k = parts.iter().map(|p| cols(p.0, blocks)).max().unwrap();
        let matrices: Vec<_> = parts.iter().map(|&(f, n)| Matrix::random(f, n, k, &mut rng)).collect();
        let sources: Vec<_> = matrices.iter().map(|m| m.source(0..m.rows)).collect();
        let stack = pack(&sources);
        let x = rng.activations(m * k);
        let y = multiply(&stack, &x, Isa::detect(), threads);
        for row in 0..m {
            let mut start = row * stack.rows();
            for matrix in &matrices {
                let alone = multiply(&matrix.pack(), &x[row * k..][..k], Isa::PORTABLE, 1);
                prop_assert_eq!(bits(&alone), bits(&y[start..start + matrix.rows]));
                start += matrix.rows;
            }
        }
    }
}

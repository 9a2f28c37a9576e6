//! Whole units to weighted ranks.

use std::ops::Range;

/// Gives `total` units to ranks in proportion to their weights, by largest remainders (Hamilton's method) with a floor
/// of `minimum` each; earlier ranks win ties. `weights` are positive and finite, and `total` covers the minima.
pub(super) fn apportion(total: usize, weights: &[f64], minimum: usize) -> Vec<usize> {
    let sum: f64 = weights.iter().sum();
    let quotas: Vec<f64> = weights.iter().map(|weight| total as f64 * weight / sum).collect();
    // A float cast saturates, and `min` keeps rounding from handing out more than there is.
    let mut shares: Vec<usize> = quotas
        .iter()
        .map(|quota| (*quota as usize).clamp(minimum, total.max(minimum)))
        .collect();
    loop {
        let given: usize = shares.iter().sum();
        // How much a rank has beyond its quota.
        let surplus = |rank: usize| shares[rank] as f64 - quotas[rank];
        if given < total {
            let neediest = (0..shares.len())
                .reduce(|best, rank| if surplus(rank) < surplus(best) { rank } else { best });
            let Some(neediest) = neediest else { return shares };
            shares[neediest] += 1;
        } else if given > total {
            let donors = (0..shares.len()).filter(|&rank| shares[rank] > minimum);
            let richest = donors.reduce(|best, rank| {
                if surplus(rank) >= surplus(best) {
                    rank
                } else {
                    best
                }
            });
            let Some(richest) = richest else { return shares };
            shares[richest] -= 1;
        } else {
            return shares;
        }
    }
}

/// Consecutive ranges of `unit` elements each share, over `0..size`; the last unit may be shorter.
pub(super) fn ranges(shares: &[usize], unit: usize, size: usize) -> Vec<Range<usize>> {
    let mut end = 0;
    shares
        .iter()
        .map(|share| {
            let start = end;
            end = (start + share * unit).min(size);
            start..end
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remainders_go_to_the_largest_then_to_the_first() {
        assert_eq!(apportion(3, &[1.0, 1.0], 1), [2, 1]);
        assert_eq!(apportion(10, &[2.0, 1.0], 1), [7, 3]);
        assert_eq!(apportion(4, &[1.0, 1.0, 1.0], 0), [2, 1, 1]);
    }

    #[test]
    fn the_minimum_is_taken_from_those_with_most() {
        assert_eq!(apportion(4, &[1000.0, 1.0, 1.0], 1), [2, 1, 1]);
        assert_eq!(apportion(1, &[1.0, 1.0], 0), [1, 0]);
    }

    #[test]
    fn extreme_weights_neither_hang_nor_overflow() {
        assert_eq!(
            apportion(1 << 20, &[f64::from(f32::MAX), f64::from(f32::MIN_POSITIVE)], 1),
            [(1 << 20) - 1, 1]
        );
    }
}

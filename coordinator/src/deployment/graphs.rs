//! Which decode steps the ranks capture as CUDA graphs. A step is padded to the next size that there is.

use phalanx_proto::{step::StepLimits, v1};

use super::{Deployment, DeploymentError};
use crate::config::ModelOptions;

/// Unless sizes are named, steps of more rows are not captured: the device is busy with each op for longer than it takes
/// to launch it.
const MAX_DEFAULT_SIZE: u32 = 512;
/// A start would take long, and graphs take memory.
const MAX_SIZES: usize = 512;

/// Rows of the steps, rising; none if execution is to be eager.
pub(super) fn sizes(options: &ModelOptions, limits: &StepLimits) -> Vec<u32> {
    if options.enforce_eager {
        return Vec::new();
    }
    let most = limits.max_rows.min(limits.max_tokens);
    match &options.cudagraph_capture_sizes {
        None => default_sizes(most),
        Some(sizes) => {
            let mut sizes: Vec<u32> = sizes.iter().copied().filter(|&size| size <= most).collect();
            sizes.sort_unstable();
            sizes.dedup();
            sizes
        }
    }
}

impl Deployment {
    /// Rows of the steps that are captured, rising; none on CPUs.
    pub fn cudagraph_capture_sizes(&self) -> Vec<u32> {
        match self.device {
            v1::DeviceKind::Cuda => sizes(&self.blueprint.options, &self.limits),
            v1::DeviceKind::Cpu | v1::DeviceKind::Unspecified => Vec::new(),
        }
    }

    /// Says so where options about graphs were given that nothing comes of.
    pub(crate) fn note_graph_options(&self) {
        let given =
            self.blueprint.options.enforce_eager || self.blueprint.options.cudagraph_capture_sizes.is_some();
        if given && self.device == v1::DeviceKind::Cpu {
            tracing::info!(
                "CPUs have no CUDA graphs: --enforce-eager and --cudagraph-capture-sizes change nothing"
            );
        }
    }
}

/// vLLM's: 1, 2, 4, then every 8th to 256 and every 16th after that, and the largest step there is.
fn default_sizes(most: u32) -> Vec<u32> {
    let end = most.min(MAX_DEFAULT_SIZE);
    let steps = [1, 2, 4].into_iter();
    let steps = steps.chain((8..256).step_by(8)).chain((256..).step_by(16));
    let mut sizes: Vec<u32> = steps.take_while(|&size| size < end).collect();
    sizes.push(end);
    sizes
}

/// # Errors
/// [`DeploymentError::OverLimit`] for more sizes than there may be.
pub(super) fn check(options: &ModelOptions) -> Result<(), DeploymentError> {
    let sizes = options.cudagraph_capture_sizes.as_ref().map_or(0, Vec::len);
    if sizes > MAX_SIZES {
        return Err(DeploymentError::OverLimit {
            field: "number of cudagraph_capture_sizes",
            value: sizes,
            limit: MAX_SIZES,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::default_sizes;

    #[test]
    fn default_sizes_are_vllms_and_end_with_the_largest_step() {
        assert_eq!(default_sizes(1), [1]);
        assert_eq!(default_sizes(8), [1, 2, 4, 8]);
        assert_eq!(default_sizes(20), [1, 2, 4, 8, 16, 20]);
        let all = default_sizes(10_000);
        assert_eq!(all.last(), Some(&512));
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(all.contains(&248) && all.contains(&256) && all.contains(&272) && !all.contains(&264));
    }
}

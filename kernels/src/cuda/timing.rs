//! How long the device itself takes, by its own clock.

use std::time::Duration;

use cudarc::driver::sys::CUevent_flags;

use super::CudaBackend;
use super::error::driver;
use crate::Result;

impl CudaBackend {
    /// The device's time for what one call of `work` puts into its queue: the mean of `repetitions` calls, which must be
    /// one at least, after one that does not count. Where the host is slower than the device, it is the host's time.
    ///
    /// # Errors
    /// [`KernelError::Device`](crate::KernelError::Device); what `work` returns.
    pub fn time(&self, repetitions: u32, mut work: impl FnMut() -> Result<()>) -> Result<Duration> {
        const OP: &str = "timing";
        let event = || {
            let event = self
                .device
                .context
                .new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
            event.map_err(|e| driver(OP, e))
        };
        let (start, end) = (event()?, event()?);
        work()?;
        start.record(&self.device.stream).map_err(|e| driver(OP, e))?;
        for _ in 0..repetitions {
            work()?;
        }
        end.record(&self.device.stream).map_err(|e| driver(OP, e))?;
        let milliseconds = start.elapsed_ms(&end).map_err(|e| driver(OP, e))?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3) / repetitions.max(1))
    }
}

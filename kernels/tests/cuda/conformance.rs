//! The conformance suite, as for every backend.

use phalanx_kernels::conformance::Tolerances;
use phalanx_kernels::conformance_suite;

use crate::support::open;

conformance_suite!(
    #[ignore = "needs a device"]
    cuda,
    |_threads| open(),
    Tolerances::BF16
);

//! The CPU backend, with the machine's best instructions and without any.

use phalanx_kernels::conformance::Tolerances;
use phalanx_kernels::conformance_suite;
use phalanx_kernels::cpu::CpuBackend;

conformance_suite!(
    native,
    |threads| CpuBackend::new(threads).unwrap(),
    Tolerances::F32
);
conformance_suite!(
    portable,
    |threads| CpuBackend::portable(threads).unwrap(),
    Tolerances::F32
);

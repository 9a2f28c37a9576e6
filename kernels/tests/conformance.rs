//! The CPU backend, with the machine's best instructions and without any.

use phalanx_kernels::conformance::{Tolerances, attention_over_long_contexts_is_the_same};
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

/// Not in the suite: on a device that is emulated it would take minutes.
#[test]
fn long_contexts() {
    attention_over_long_contexts_is_the_same(&|threads| CpuBackend::new(threads).unwrap(), &Tolerances::F32);
    attention_over_long_contexts_is_the_same(
        &|threads| CpuBackend::portable(threads).unwrap(),
        &Tolerances::F32,
    );
}

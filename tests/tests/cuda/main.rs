//! A rank per GPU, end to end, on the soft GPU: the binary is the same, its libraries are stand-ins. With
//! `PHALANX_REAL_GPU=1` the same tests use this machine's own.

mod faults;
mod gpu_check;
mod hardware;
mod libraries;
mod support;
mod tokens;

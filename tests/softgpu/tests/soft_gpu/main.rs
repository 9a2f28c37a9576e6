//! The soft GPU through unmodified cudarc: every test runs again in a process of its own that finds the libraries.

mod collectives;
mod driver;
mod faults;
mod graphs;
mod kernels;
mod products;
mod support;

//! The CPU linear layer against scalar references: formats, accuracy, and bits that depend on nothing they should not.

mod edges;
mod invariance;
mod shapes;
mod support;
mod values;

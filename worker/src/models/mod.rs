//! Forward passes, written once for every device, every rank count and every tensor format.

pub mod llama;

pub use llama::LlamaForCausalLm;

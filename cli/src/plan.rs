//! `phalanx plan`: who would hold what, and the bytes.

use std::path::Path;

use phalanx_coordinator::deployment::{Hardware, Proposal};
use phalanx_model::memory::HumanBytes;

use crate::{args::PlanArgs, resolve};

#[expect(clippy::print_stdout, reason = "the table is the command's output")]
pub(crate) fn run(args: &PlanArgs) -> anyhow::Result<()> {
    let proposal = Proposal::open(resolve::model(&args.model)?)?;
    // What GPUs there will be is known to the ranks alone.
    let deployment = proposal.resolve(&Hardware::Cpu, Path::new("/dev/shm"))?;
    let config = deployment.checkpoint.config();
    println!("model    {}", deployment.checkpoint.path().display());
    println!(
        "         {} layers, hidden {}, {} query / {} KV heads of {}, MLP {}, vocabulary {}",
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
        config.vocab_size,
    );
    println!("context  {} tokens", deployment.max_model_len);
    let blocks = u64::from(deployment.num_blocks);
    println!(
        "KV cache {blocks} blocks of {} tokens",
        deployment.options.block_size
    );
    println!("/dev/shm {}\n", HumanBytes(deployment.shape(1).total_bytes()));
    println!("{}", deployment.memory.table(blocks));
    Ok(())
}

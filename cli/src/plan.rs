//! `phalanx plan`: who would hold what, and the bytes. Nothing is loaded, and the devices need not be there.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use phalanx_coordinator::deployment::{Blueprint, Draft, Hardware, Plan, free_space};
use phalanx_model::{
    GpuMemory, RankBudget,
    memory::{GpuCard, HumanBytes, LEAST_COMPUTE_CAPABILITY, RankMemory},
};
use serde_json::{Value, json};

use crate::{
    args::{Device, PlanArgs},
    resolve,
    values::parse_bytes,
};

/// A GPU is not larger than this; more is a slip of the pen.
const MOST_GPU_BYTES: u64 = 1 << 44;

#[expect(clippy::print_stdout, reason = "the plan is the command's output")]
pub(crate) fn run(args: &PlanArgs) -> anyhow::Result<()> {
    let options = resolve::model(&args.model)?;
    let gpu = Gpu::of(args)?;
    let blueprint = Blueprint::open(options)?;
    let ranks = blueprint.options.tensor_parallel_size;
    let (hardware, shared_memory) = match &gpu {
        // On another machine, whose /dev/shm is not known.
        Some(gpu) => (
            Hardware::Cuda(vec![GpuMemory::unused(gpu.total, gpu.multiplies_e4m3); ranks]),
            u64::MAX,
        ),
        None => (Hardware::Cpu, free_space(Path::new("/dev/shm"))?),
    };
    let blueprint = blueprint.fitted(&hardware, shared_memory)?;
    let draft = blueprint.draft(&hardware, shared_memory)?;
    let plan = blueprint.accept(draft.clone());
    if args.json {
        println!("{:#}", report(&blueprint, &draft, plan.as_ref()));
        return Ok(plan.map(drop)?);
    }
    print!("{}", heading(&blueprint, &draft, gpu.as_ref()));
    match plan {
        Ok(plan) => println!(
            "{}\n{}",
            capacity(&plan),
            plan.memory.table(plan.num_blocks.into())
        ),
        Err(error) => {
            println!("\n{}", draft.memory.table(0));
            return Err(error.into());
        }
    }
    Ok(())
}

/// What is planned for.
struct Gpu {
    name: String,
    total: u64,
    multiplies_e4m3: bool,
    /// Why Phalanx would not run there.
    lack: Option<String>,
}

impl Gpu {
    fn of(args: &PlanArgs) -> anyhow::Result<Option<Self>> {
        let Some(text) = &args.gpu else {
            ensure!(
                args.model.device != Device::Cuda,
                "--device cuda plans for GPUs: say which with --gpu, e.g. --gpu H100-80GB or --gpu 80GiB"
            );
            return Ok(None);
        };
        ensure!(
            args.model.device != Device::Cpu,
            "--gpu {text} and --device cpu exclude each other"
        );
        if let Some(card) = GpuCard::find(text) {
            let ((major, minor), (least, _)) = (card.compute_capability, LEAST_COMPUTE_CAPABILITY);
            let lack = format!("it has compute capability {major}.{minor}, the kernels need {least}.0");
            return Ok(Some(Self {
                name: card.name.to_owned(),
                total: card.total,
                multiplies_e4m3: card.multiplies_e4m3(),
                lack: (!card.is_supported()).then_some(lack),
            }));
        }
        let names = || GpuCard::ALL.map(|card| card.name).join(", ");
        if !text.starts_with(|c: char| c.is_ascii_digit()) {
            bail!(
                "--gpu {text}: no such card; known are {}, or give a size such as 80GiB",
                names()
            );
        }
        let total = parse_bytes(text).map_err(anyhow::Error::msg);
        let total = total.with_context(|| format!("--gpu {text}"))?;
        ensure!(
            (1..=MOST_GPU_BYTES).contains(&total),
            "--gpu {text}: must be 1 to {MOST_GPU_BYTES} bytes"
        );
        Ok(Some(Self {
            name: format!("GPU of {text}"),
            total,
            // Nothing is known of it: the more careful plan.
            multiplies_e4m3: false,
            lack: None,
        }))
    }
}

fn heading(blueprint: &Blueprint, draft: &Draft, gpu: Option<&Gpu>) -> String {
    let config = &blueprint.geometry.config;
    let mut lines = vec![
        format!("model     {}", blueprint.options.path.display()),
        format!(
            "          {} layers, hidden {}, {} query / {} KV heads of {}, MLP {}, vocabulary {}",
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.intermediate_size,
            config.vocab_size,
        ),
        format!("context   {} tokens", blueprint.max_model_len),
    ];
    if let (Some(gpu), RankBudget::Gpus(budget)) = (gpu, &draft.budget.ranks)
        && let Some(one) = budget.poorest()
    {
        lines.push(format!(
            "devices   {} x {}, {}",
            budget.gpus.len(),
            gpu.name,
            HumanBytes(gpu.total)
        ));
        lines.push(format!(
            "          {} for a rank: {:.2} of it, less a CUDA context of {}",
            HumanBytes(one.budget(budget.utilization)),
            budget.utilization,
            HumanBytes(one.context()),
        ));
        if let Some(lack) = &gpu.lack {
            lines.push(format!("          Phalanx would not run there: {lack}"));
        }
    }
    lines.push(format!("/dev/shm  {}", HumanBytes(draft.memory.segment)));
    lines.join("\n") + "\n"
}

/// How much may be served at a time.
fn capacity(plan: &Plan) -> String {
    let Capacity {
        tokens,
        sequences,
        bytes_per_token,
    } = Capacity::of(plan);
    let kv = HumanBytes(bytes_per_token);
    format!(
        "KV cache  {tokens} tokens: {sequences:.2} sequences of {} tokens; a token takes at most {kv} on a rank\n",
        plan.memory.max_model_len
    )
}

struct Capacity {
    tokens: u64,
    /// Of the longest.
    sequences: f64,
    /// On the rank that holds most.
    bytes_per_token: u64,
}

impl Capacity {
    fn of(plan: &Plan) -> Self {
        let memory = &plan.memory;
        let (blocks, block_size) = (u64::from(plan.num_blocks), memory.block_size as u64);
        Self {
            tokens: blocks * block_size,
            sequences: blocks as f64 / memory.blocks_per_sequence() as f64,
            bytes_per_token: bytes_per_token(memory.ranks.iter(), block_size),
        }
    }
}

fn bytes_per_token<'a>(ranks: impl Iterator<Item = &'a RankMemory>, block_size: u64) -> u64 {
    ranks.map(|rank| rank.kv_bytes_per_block).max().unwrap_or(0) / block_size
}

/// All of it for programs. Bytes are numbers.
fn report(blueprint: &Blueprint, draft: &Draft, plan: Result<&Plan, &impl ToString>) -> Value {
    let memory = &draft.memory;
    let blocks = plan.map_or(0, |plan| u64::from(plan.num_blocks));
    let available = match &draft.budget.ranks {
        RankBudget::Gpus(gpus) => json!(gpus.bytes()),
        RankBudget::Pooled(bytes) => json!(bytes),
    };
    let rank = |(rank, bytes): (usize, &RankMemory)| {
        json!({
            "rank": rank,
            "weights": bytes.weights,
            "workspace": bytes.workspace,
            "overhead": bytes.overhead,
            "nccl": bytes.communicator,
            "cuda_graphs": bytes.graphs,
            "kv_cache": bytes.kv_bytes(blocks),
            "kv_per_token": bytes.kv_bytes_per_block / memory.block_size as u64,
            "total": bytes.total(blocks),
        })
    };
    let capacity = plan.ok().map(Capacity::of);
    json!({
        "model": blueprint.options.path.display().to_string(),
        "tensor_parallel_size": memory.ranks.len(),
        "tensor_parallel_style": format!("{:?}", draft.style).to_lowercase(),
        "max_model_len": memory.max_model_len,
        "block_size": memory.block_size,
        "fits": plan.is_ok(),
        "error": plan.err().map(ToString::to_string),
        "num_blocks": plan.ok().map(|plan| plan.num_blocks),
        "kv_tokens": capacity.as_ref().map(|capacity| capacity.tokens),
        "max_concurrency": capacity.as_ref().map(|capacity| capacity.sequences),
        "available": available,
        "shared_memory": memory.segment,
        "ranks": memory.ranks.iter().enumerate().map(rank).collect::<Vec<_>>(),
    })
}

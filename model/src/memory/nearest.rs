//! What would fit instead. Everything that is suggested has been planned.

use std::fmt;

use super::{
    GpuBudget, HumanBytes, MemoryBudget, MemoryError, MemoryHolder, MemoryPlan, MemoryRequest, RankBudget,
    Shortage,
};
use crate::{KvDtype, TensorFormat, TensorFormats, TensorParallelOptions, TensorRole};

/// Element types of a KV cache, the most exact first.
const KV_DTYPES: [KvDtype; 2] = [KvDtype::F16, KvDtype::E4M3];
/// Formats of weights, the most exact first.
const FORMATS: [TensorFormat; 5] = [
    TensorFormat::Q8_0,
    TensorFormat::F8_E4M3,
    TensorFormat::Q6_K,
    TensorFormat::Q4_K,
    TensorFormat::Q4_0,
];
/// More of a GPU than this is not suggested: fragments, and whatever the display or a debugger takes.
const MOST_UTILIZATION_PERCENT: u32 = 97;
/// A context that is worth having, where the one that was asked for is too long for any number of ranks nearby.
const MODEST_MODEL_LEN: usize = 8192;

/// The nearest configurations that would fit: each with everything else as asked.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Nearest {
    pub max_model_len: Option<usize>,
    /// Equal ranks, each with as much memory as the poorest has now.
    pub world_size: Option<usize>,
    /// Fewer ranks than that, with a shorter context.
    pub world_size_and_len: Option<(usize, usize)>,
    pub kv_dtype: Option<KvDtype>,
    pub gpu_memory_utilization: Option<f32>,
    /// Fewer tokens in one step make activations and the segment smaller.
    pub max_tokens: Option<usize>,
    /// Of all matrices of layers.
    pub format: Option<TensorFormat>,
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |flag: &str, value: Option<usize>| value.map(|value| format!("{flag} {value}"));
        let suggestions = [
            number("--max-model-len", self.max_model_len),
            self.kv_dtype
                .map(|dtype| format!("--kv-cache-dtype {}", flag_value(dtype))),
            self.gpu_memory_utilization
                .map(|part| format!("--gpu-memory-utilization {part:.2}")),
            number("--max-num-batched-tokens", self.max_tokens),
            self.world_size_and_len
                .map(|(ranks, len)| format!("--tensor-parallel-size {ranks} --max-model-len {len}")),
            number("--tensor-parallel-size", self.world_size),
            self.format.map(|format| match format {
                TensorFormat::F8_E4M3 => "--quantization fp8".to_owned(),
                format => format!("weights in {format:?}"),
            }),
        ];
        let mut separator = "it fits with";
        for suggestion in suggestions.into_iter().flatten() {
            write!(f, "{separator} {suggestion}")?;
            separator = ", or with";
        }
        if *self == Self::default() {
            f.write_str("nothing nearby fits")?;
        }
        Ok(())
    }
}

/// As the command line has it.
fn flag_value(dtype: KvDtype) -> &'static str {
    match dtype {
        KvDtype::F32 => "f32",
        KvDtype::F16 => "f16",
        KvDtype::BF16 => "bf16",
        KvDtype::E4M3 => "fp8",
        KvDtype::INT8 => "int8",
    }
}

/// That the context's length does not matter, if that is so.
pub(super) struct NoLength {
    pub(super) fixed: u64,
    pub(super) available: u64,
}

impl fmt::Display for NoLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.fixed <= self.available {
            return Ok(());
        }
        let fixed = HumanBytes(self.fixed);
        write!(
            f,
            "no --max-model-len helps, {fixed} are needed without any KV cache; "
        )
    }
}

/// What would fit in place of `request`, whose plan is short of memory.
pub(super) fn find(
    plan: &MemoryPlan,
    (request, budget): (&MemoryRequest<'_>, &MemoryBudget),
    shortage: &Shortage,
) -> Result<Nearest, MemoryError> {
    let search = Search { request, budget };
    if shortage.holder == MemoryHolder::SharedSegment {
        return Ok(Nearest {
            max_tokens: search.tokens_of_segment(plan, shortage.available),
            ..Nearest::default()
        });
    }
    let world_size = search.world_size(request.max_model_len);
    let modest = request.max_model_len.min(MODEST_MODEL_LEN);
    let with_less = search
        .world_size(modest)
        .filter(|&ranks| world_size.is_none_or(|more| ranks < more));
    Ok(Nearest {
        max_model_len: search.max_model_len(plan.num_blocks(budget)?),
        world_size,
        world_size_and_len: with_less.map(|ranks| (ranks, modest)),
        kv_dtype: search.kv_dtype(),
        gpu_memory_utilization: search.utilization(),
        max_tokens: search.max_tokens(),
        format: search.format(),
    })
}

struct Search<'a> {
    request: &'a MemoryRequest<'a>,
    budget: &'a MemoryBudget,
}

impl Search<'_> {
    fn fits(&self, change: impl FnOnce(&mut MemoryRequest<'_>)) -> bool {
        let mut request = self.request.clone();
        change(&mut request);
        plan_fits(&request, self.budget)
    }

    /// `blocks` are what there is room for, which is less than one sequence needs.
    fn max_model_len(&self, blocks: u64) -> Option<usize> {
        let length = (blocks as usize).checked_mul(self.request.block_size)?;
        let shorter = length > 0 && length < self.request.max_model_len;
        (shorter && self.fits(|request| request.max_model_len = length)).then_some(length)
    }

    fn kv_dtype(&self) -> Option<KvDtype> {
        let asked = self.request.kv_dtype.bytes();
        let mut narrower = KV_DTYPES.into_iter().filter(|dtype| dtype.bytes() < asked);
        narrower.find(|&dtype| self.fits(|request| request.kv_dtype = dtype))
    }

    fn max_tokens(&self) -> Option<usize> {
        // A step has room for a token of every sequence.
        let least = self.request.max_rows.max(1);
        let halves = std::iter::successors(Some(self.request.max_tokens / 2), |tokens| Some(tokens / 2));
        halves
            .take_while(|&tokens| tokens >= least)
            .find(|&tokens| self.fits(|request| request.max_tokens = tokens))
    }

    /// The bytes that a segment may have, in tokens.
    fn tokens_of_segment(&self, plan: &MemoryPlan, available: u64) -> Option<usize> {
        let per_token = plan.arena.div_ceil(self.request.max_tokens as u64);
        let pages = available.saturating_sub(self.request.control_bytes) / super::PAGE * super::PAGE;
        // At most two buffers are shared, and each may be padded.
        let room = pages.saturating_sub(2 * super::ARENA_ALIGN as u64);
        let tokens = room.checked_div(per_token).filter(|&tokens| tokens > 0)? as usize;
        self.fits(|request| request.max_tokens = tokens).then_some(tokens)
    }

    fn utilization(&self) -> Option<f32> {
        let RankBudget::Gpus(gpus) = &self.budget.ranks else {
            return None;
        };
        let next = (f64::from(gpus.utilization) * 100.0).round() as u32 + 1;
        (next..=MOST_UTILIZATION_PERCENT)
            .map(|percent| percent as f32 / 100.0)
            .find(|&utilization| {
                let gpus = gpus.gpus.clone();
                let budget = MemoryBudget {
                    ranks: RankBudget::Gpus(GpuBudget { gpus, utilization }),
                    shared_memory: self.budget.shared_memory,
                };
                plan_fits(self.request, &budget)
            })
    }

    /// The fewest more ranks.
    fn world_size(&self, max_model_len: usize) -> Option<usize> {
        let heads = self.request.config.num_attention_heads;
        (self.request.parallel.world_size + 1..=heads.min(self.request.most_ranks)).find(|&world_size| {
            let mut wider = self.request.clone();
            wider.parallel = TensorParallelOptions::equal(world_size, self.request.parallel.style);
            wider.max_model_len = max_model_len;
            plan_fits(&wider, &self.budget_of(world_size))
        })
    }

    fn budget_of(&self, world_size: usize) -> MemoryBudget {
        let mut budget = self.budget.clone();
        if let RankBudget::Gpus(gpus) = &mut budget.ranks {
            gpus.gpus = gpus
                .poorest()
                .map_or_else(Vec::new, |poorest| vec![poorest; world_size]);
        }
        budget
    }

    fn format(&self) -> Option<TensorFormat> {
        FORMATS.into_iter().find(|&format| {
            let formats: TensorFormats = self
                .request
                .formats
                .iter()
                .map(|(&role, &found)| {
                    let changed = matches!(role, TensorRole::Layer { .. }) && !role.is_vector();
                    (role, if changed { format } else { found })
                })
                .collect();
            let request = MemoryRequest {
                formats: &formats,
                ..self.request.clone()
            };
            plan_fits(&request, self.budget)
        })
    }
}

fn plan_fits(request: &MemoryRequest<'_>, budget: &MemoryBudget) -> bool {
    MemoryPlan::new(request).is_ok_and(|plan| matches!(plan.shortage(budget), Ok(None)))
}

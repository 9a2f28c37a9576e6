//! Shard plans: the ranges tile every tensor, whatever the geometry, the number of ranks and their weights.

mod support;

use std::ops::Range;

use phalanx_model::{
    ModelConfig, RowSplitBlocks, Shard, ShardError, ShardPlan, TensorParallelOptions, TensorParallelStyle,
    shard::VOCAB_ALIGN,
};
use proptest::prelude::*;
use support::{llama_70b, tiny_config};

const NO_BLOCKS: RowSplitBlocks = RowSplitBlocks { o: 1, down: 1 };
const GATHER: TensorParallelStyle = TensorParallelStyle::Gather;
const REDUCE: TensorParallelStyle = TensorParallelStyle::Reduce;

/// SmolLM2-135M.
fn smollm2() -> ModelConfig {
    let mut config = tiny_config();
    config.hidden_size = 576;
    config.intermediate_size = 1536;
    config.num_attention_heads = 9;
    config.num_key_value_heads = 3;
    config.head_dim = 64;
    config.rope.rotary_dim = 64;
    config.vocab_size = 49_152;
    config
}

fn equal(
    config: &ModelConfig,
    world_size: usize,
    style: TensorParallelStyle,
) -> Result<ShardPlan, ShardError> {
    ShardPlan::new(
        config,
        &TensorParallelOptions::equal(world_size, style),
        NO_BLOCKS,
    )
}

fn heads(plan: &ShardPlan) -> Vec<(Range<usize>, Range<usize>)> {
    plan.ranks
        .iter()
        .map(|rank| (rank.q_heads.clone(), rank.kv_heads.clone()))
        .collect()
}

#[test]
fn nine_heads_in_three_groups_split_over_any_number_of_ranks() {
    let config = smollm2();
    assert_eq!(heads(&equal(&config, 1, GATHER).unwrap()), [(0..9, 0..3)]);
    assert_eq!(
        heads(&equal(&config, 2, GATHER).unwrap()),
        [(0..6, 0..2), (6..9, 2..3)]
    );
    assert_eq!(
        heads(&equal(&config, 3, GATHER).unwrap()),
        [(0..3, 0..1), (3..6, 1..2), (6..9, 2..3)]
    );
    let four = [(0..2, 0..1), (2..3, 0..1), (3..6, 1..2), (6..9, 2..3)];
    assert_eq!(heads(&equal(&config, 4, GATHER).unwrap()), four);
    let nine = equal(&config, 9, GATHER).unwrap();
    assert!(
        nine.ranks
            .iter()
            .enumerate()
            .all(|(i, rank)| rank.q_heads == (i..i + 1))
    );
    assert!(
        nine.ranks
            .iter()
            .enumerate()
            .all(|(i, rank)| rank.kv_heads == (i / 3..i / 3 + 1))
    );
    let error = equal(&config, 10, GATHER).unwrap_err();
    assert_eq!(
        error,
        ShardError::WorldSize {
            world_size: 10,
            limit: 9
        }
    );
    assert!(matches!(
        equal(&config, 0, GATHER),
        Err(ShardError::WorldSize { .. })
    ));
}

#[test]
fn two_equal_ranks_share_columns_and_vocabulary_evenly() {
    let plan = equal(&smollm2(), 2, GATHER).unwrap();
    let [first, second] = plan.ranks.as_slice() else {
        panic!("two ranks")
    };
    assert_eq!((&first.hidden, &second.hidden), (&(0..288), &(288..576)));
    assert_eq!(
        (&first.intermediate, &second.intermediate),
        (&(0..768), &(768..1536))
    );
    assert_eq!((&first.vocab, &second.vocab), (&(0..24_576), &(24_576..49_152)));
}

#[test]
fn weights_apportion_everything() {
    let mut options = TensorParallelOptions::equal(2, GATHER);
    options.rank_weights = Some(vec![2.0, 1.0]);
    let plan = ShardPlan::new(&llama_70b(), &options, NO_BLOCKS).unwrap();
    let first = &plan.ranks[0];
    assert_eq!((&first.kv_heads, &first.q_heads), (&(0..5), &(0..40)));
    assert_eq!(first.hidden, 0..5456);
    assert_eq!(first.intermediate, 0..19_120);
    assert_eq!(first.vocab, 0..167 * VOCAB_ALIGN);
}

#[test]
fn unusable_weights_are_refused() {
    let with = |weights: &[f32]| {
        let mut options = TensorParallelOptions::equal(2, GATHER);
        options.rank_weights = Some(weights.to_vec());
        ShardPlan::new(&smollm2(), &options, NO_BLOCKS)
    };
    assert_eq!(
        with(&[1.0]),
        Err(ShardError::WeightCount {
            found: 1,
            expected: 2
        })
    );
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(matches!(
            with(&[1.0, bad]),
            Err(ShardError::Weight { rank: 1, .. })
        ));
    }
    assert!(with(&[f32::MAX, f32::MIN_POSITIVE]).is_ok());
}

#[test]
fn tiny_vocabularies_leave_ranks_without_logits() {
    let plan = equal(&tiny_config(), 4, GATHER).unwrap();
    let vocab: Vec<_> = plan.ranks.iter().map(|rank| rank.vocab.clone()).collect();
    assert_eq!(vocab, [0..70, 70..70, 70..70, 70..70]);
    assert_eq!(plan.validate(&tiny_config()), Ok(()));
}

#[test]
fn reduce_style_never_cuts_a_quantization_block() {
    let config = llama_70b();
    let blocks = RowSplitBlocks { o: 256, down: 256 };
    let plan = ShardPlan::new(&config, &TensorParallelOptions::equal(16, REDUCE), blocks).unwrap();
    assert!(
        plan.ranks
            .iter()
            .all(|rank| rank.intermediate.start % 256 == 0 && rank.q_heads.len() == 4)
    );
    // Two heads of 128 make a block, so the 8 heads of a group serve 4 ranks.
    let error = ShardPlan::new(&config, &TensorParallelOptions::equal(33, REDUCE), blocks).unwrap_err();
    let expected = ShardError::CutsBlock {
        tensor: "o_proj",
        block: 256,
        parts: 32,
        world_size: 33,
    };
    assert_eq!(error, expected);
    // 192 columns of a KV group are no whole number of blocks of 256.
    let blocks = RowSplitBlocks { o: 256, down: 32 };
    let smol = ShardPlan::new(&smollm2(), &TensorParallelOptions::equal(2, REDUCE), blocks);
    assert!(matches!(smol, Err(ShardError::CutsBlock { parts: 1, .. })));
    let gather = ShardPlan::new(&smollm2(), &TensorParallelOptions::equal(2, GATHER), blocks);
    assert!(gather.is_ok());
}

#[test]
fn plans_of_peers_are_checked() {
    let config = smollm2();
    let good = equal(&config, 2, GATHER).unwrap();
    let broken = |change: fn(&mut ShardPlan)| {
        let mut plan = good.clone();
        change(&mut plan);
        plan.validate(&config)
    };
    assert_eq!(broken(|_| ()), Ok(()));
    assert!(broken(|plan| plan.ranks.clear()).is_err());
    assert!(broken(|plan| plan.ranks[0].hidden = 0..300).is_err());
    assert!(broken(|plan| plan.ranks[1].vocab.end = usize::MAX).is_err());
    assert!(broken(|plan| plan.ranks[1].kv_heads = 1..3).is_err());
    assert!(broken(|plan| plan.ranks[1].intermediate = Range { start: 768, end: 0 }).is_err());
    assert!(broken(|plan| plan.style = REDUCE).is_err());
    assert!(matches!(
        broken(|plan| (plan.ranks[0].vocab.end, plan.ranks[1].vocab.start) = (100, 100)),
        Err(ShardError::NotTiled { .. })
    ));
}

prop_compose! {
    fn geometries()(
        kv_heads in 1_usize..9,
        group in 1_usize..9,
        head_dim in prop::sample::select(vec![32_usize, 64, 128]),
        hidden in 3_usize..80,
        intermediate in 3_usize..120,
        vocab_size in 1_usize..9000,
        bias in any::<bool>(),
    ) -> ModelConfig {
        let mut config = tiny_config();
        config.num_key_value_heads = kv_heads;
        config.num_attention_heads = kv_heads * group;
        config.head_dim = head_dim;
        config.rope.rotary_dim = head_dim;
        config.hidden_size = hidden * 32;
        config.intermediate_size = intermediate * 32;
        config.vocab_size = vocab_size;
        config.attention_bias = bias;
        config.mlp_bias = bias;
        config.tie_word_embeddings = bias;
        config
    }
}

fn splits() -> impl Strategy<Value = (ModelConfig, TensorParallelOptions, RowSplitBlocks)> {
    geometries().prop_flat_map(|config| {
        let options =
            (1..=config.num_attention_heads, any::<bool>()).prop_flat_map(|(world_size, reduce)| {
                let weights = prop::option::of(prop::collection::vec(0.01_f32..100.0, world_size));
                weights.prop_map(move |rank_weights| TensorParallelOptions {
                    world_size,
                    style: if reduce { REDUCE } else { GATHER },
                    rank_weights,
                })
            });
        let blocks = prop::sample::select(vec![1_usize, 32, 256]).prop_map(|block| RowSplitBlocks {
            o: block,
            down: block,
        });
        (Just(config), options, blocks)
    })
}

/// Whether ranges lie one behind the other over `0..size`.
fn tile(ranges: impl IntoIterator<Item = Range<usize>>, size: usize) -> bool {
    let end = ranges.into_iter().try_fold(0, |end, range| {
        (range.start == end && range.end >= end).then_some(range.end)
    });
    end == Some(size)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ranges_tile_every_tensor((config, options, blocks) in splits()) {
        let plan = match ShardPlan::new(&config, &options, blocks) {
            Ok(plan) => plan,
            Err(ShardError::CutsBlock { parts, world_size, .. }) => {
                prop_assert!(options.style == REDUCE && blocks.o > 1 && parts < world_size);
                return Ok(());
            }
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        };
        prop_assert_eq!(plan.validate(&config), Ok(()));
        let ranks = 0..options.world_size;
        for role in config.roles() {
            let (rows, cols) = config.shape(role).unwrap();
            let slices: Vec<_> = ranks.clone().map(|rank| plan.slice(&config, rank, role).unwrap()).collect();
            match plan.shard(&config, 0, role).unwrap() {
                Shard::Replicated => {
                    prop_assert!(slices.iter().all(|slice| slice.rows == (0..rows) && slice.cols == (0..cols)));
                }
                Shard::Columns(_) => {
                    prop_assert!(tile(slices.iter().map(|slice| slice.rows.clone()), rows), "{role:?}");
                    prop_assert!(slices.iter().all(|slice| slice.cols == (0..cols)));
                }
                Shard::Rows(_) => {
                    prop_assert!(tile(slices.iter().map(|slice| slice.cols.clone()), cols), "{role:?}");
                    prop_assert!(slices.iter().all(|slice| slice.rows == (0..rows)));
                    prop_assert!(slices.iter().all(|slice| slice.cols.start % blocks.o == 0));
                }
                Shard::KvGroups(_) => {
                    let mut distinct: Vec<_> = slices.iter().map(|slice| slice.rows.clone()).collect();
                    distinct.dedup();
                    prop_assert!(tile(distinct.iter().cloned(), rows), "{role:?}");
                    let replicated = distinct.len() < slices.len();
                    prop_assert_eq!(replicated, options.world_size > config.num_key_value_heads);
                }
            }
        }
    }

    #[test]
    fn query_heads_find_their_kv_heads((config, options, blocks) in splits()) {
        let Ok(plan) = ShardPlan::new(&config, &options, blocks) else { return Ok(()) };
        for rank in &plan.ranks {
            prop_assert!(!rank.q_heads.is_empty());
            for head in rank.q_heads.clone() {
                prop_assert!(rank.kv_heads.contains(&(head / config.group_size())));
            }
        }
    }

    #[test]
    fn column_shares_are_proportional_to_weights((config, options, _) in splits()) {
        let mut options = options;
        options.style = GATHER;
        let plan = ShardPlan::new(&config, &options, NO_BLOCKS).unwrap();
        let weights = options.rank_weights.unwrap_or_else(|| vec![1.0; options.world_size]);
        let sum: f32 = weights.iter().sum();
        for (rank, weight) in plan.ranks.iter().zip(&weights) {
            let quota = config.intermediate_size as f32 * weight / sum;
            // A unit of 16 more by rounding; less only to give every other rank its one unit.
            prop_assert!((rank.intermediate.len() as f32) < quota + 16.5 || rank.intermediate.len() <= 16);
        }
    }
}

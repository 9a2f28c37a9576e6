//! The step codec: what goes in comes out, and no bytes whatever make it panic or allocate without a bound.

use phalanx_proto::step::*;
use proptest::{collection::vec, option, prelude::*};

const LIMITS: StepLimits = StepLimits {
    max_rows: 8,
    max_tokens: 64,
    max_blocks_per_row: 10,
    num_blocks: 100,
    vocab_size: 1000,
    max_edits_per_row: 6,
    max_logprobs: 5,
};

fn penalties() -> impl Strategy<Value = Penalties> {
    (
        0.1f32..3.0,
        -2.0f32..2.0,
        -2.0f32..2.0,
        vec((0..1000u32, 0..9u32), 0..=6),
    )
        .prop_map(|(repetition, presence, frequency, history)| Penalties {
            repetition,
            presence,
            frequency,
            history,
        })
}

fn sampling() -> impl Strategy<Value = RowSampling> {
    let numbers = (
        0.0f32..2.0,
        0.0f32..=1.0,
        0.0f32..=1.0,
        any::<u32>(),
        any::<u64>(),
    );
    let bias = (0..1000u32, prop_oneof![Just(f32::NEG_INFINITY), -9.0f32..9.0]);
    (
        numbers,
        option::of(0..=5u32),
        option::of(penalties()),
        vec(bias, 0..=6),
    )
        .prop_map(
            |((temperature, top_p, min_p, top_k, seed), logprobs, penalties, bias)| RowSampling {
                temperature,
                top_p,
                top_k,
                min_p,
                seed,
                logprobs,
                penalties,
                bias,
            },
        )
}

fn row() -> impl Strategy<Value = StepRow> {
    (
        any::<u64>(),
        any::<u32>(),
        vec(0..1000u32, 1..=8),
        vec(0..100u32, 1..=10),
        option::of(sampling()),
    )
        .prop_map(
            |(sequence, num_computed_tokens, token_ids, blocks, sampling)| StepRow {
                sequence: SequenceId(sequence),
                token_ids,
                num_computed_tokens,
                block_table: blocks.into_iter().map(BlockId).collect(),
                sampling,
            },
        )
}

fn plan() -> impl Strategy<Value = StepPlan> {
    (any::<u32>(), any::<u64>(), vec(row(), 0..=8), any::<bool>()).prop_map(
        |(epoch, step, rows, masks_follow)| StepPlan {
            epoch,
            step,
            rows,
            masks_follow,
        },
    )
}

fn output() -> impl Strategy<Value = StepOutput> {
    let sampled = (
        any::<u64>(),
        0..1000u32,
        any::<bool>(),
        option::of(-50.0f32..0.0),
        vec((0..1000u32, -9.0f32..0.0), 0..=5),
    );
    let sampled = sampled.prop_map(|(sequence, token, finite, logprob, top_logprobs)| SampledToken {
        sequence: SequenceId(sequence),
        token,
        finite,
        logprob,
        top_logprobs,
    });
    (any::<u32>(), any::<u64>(), any::<u32>(), vec(sampled, 0..=8)).prop_map(
        |(epoch, step, forward_us, sampled)| StepOutput {
            epoch,
            step,
            sampled,
            forward_us,
        },
    )
}

fn masks() -> impl Strategy<Value = StepMasks> {
    let allowed = vec(0..LIMITS.vocab_size, 0..40).prop_map(|ids| {
        let mut set = TokenSet::empty(LIMITS.vocab_size);
        ids.into_iter().for_each(|id| set.insert(id));
        set
    });
    let allowed = prop_oneof![Just(TokenSet::full(LIMITS.vocab_size)), allowed];
    let mask = (any::<u64>(), allowed).prop_map(|(sequence, allowed)| TokenMask {
        sequence: SequenceId(sequence),
        allowed,
    });
    (any::<u32>(), any::<u64>(), vec(mask, 0..=8)).prop_map(|(epoch, step, masks)| StepMasks {
        epoch,
        step,
        masks,
    })
}

fn encoded_masks(masks: &StepMasks) -> Vec<u8> {
    let mut slot = vec![0; LIMITS.masks_bytes()];
    let used = encode_masks(masks, &mut slot).expect("masks_bytes() holds the masks of any plan");
    slot.truncate(used);
    slot
}

fn encoded(plan: &StepPlan) -> Vec<u8> {
    let mut slot = vec![0; LIMITS.plan_bytes()];
    let used = encode_plan(plan, &mut slot).expect("plan_bytes() holds any plan within the limits");
    slot.truncate(used);
    slot
}

proptest! {
    #[test]
    fn plans_round_trip_and_fit_their_slot(plan in plan()) {
        prop_assert_eq!(decode_plan(&encoded(&plan), &LIMITS), Ok(plan));
    }

    #[test]
    fn outputs_round_trip_and_fit_their_slot(output in output()) {
        let mut slot = vec![0; LIMITS.output_bytes()];
        let used = encode_output(&output, &mut slot).expect("output_bytes() holds any output within the limits");
        prop_assert_eq!(decode_output(&slot[..used], &LIMITS), Ok(output));
    }

    #[test]
    fn masks_round_trip_and_nothing_shorter_or_longer_passes(masks in masks()) {
        let mut bytes = encoded_masks(&masks);
        prop_assert_eq!(decode_masks(&bytes, &LIMITS), Ok(masks));
        for end in 0..bytes.len() {
            prop_assert!(decode_masks(&bytes[..end], &LIMITS).is_err());
        }
        bytes.push(0);
        prop_assert_eq!(decode_masks(&bytes, &LIMITS), Err(CodecError::Trailing(1)));
    }

    #[test]
    fn damaged_masks_never_panic_and_never_allow_what_is_no_token(
        masks in masks(),
        hits in vec((any::<usize>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = encoded_masks(&masks);
        for (at, value) in hits {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if let Ok(masks) = decode_masks(&bytes, &LIMITS) {
            prop_assert!(masks.masks.len() <= LIMITS.max_rows as usize);
            let beyond = LIMITS.vocab_size..LIMITS.vocab_size + 64;
            prop_assert!(masks.masks.iter().all(|mask| beyond.clone().all(|id| !mask.allowed.contains(id))));
        }
    }

    #[test]
    fn every_proper_prefix_and_every_extension_is_refused(plan in plan()) {
        let mut bytes = encoded(&plan);
        for end in 0..bytes.len() {
            prop_assert!(decode_plan(&bytes[..end], &LIMITS).is_err());
        }
        bytes.push(0);
        prop_assert_eq!(decode_plan(&bytes, &LIMITS), Err(CodecError::Trailing(1)));
    }

    #[test]
    fn damaged_bytes_never_panic_and_never_break_a_limit(plan in plan(), hits in vec((any::<usize>(), any::<u8>()), 1..6)) {
        let mut bytes = encoded(&plan);
        for (at, value) in hits {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if let Ok(plan) = decode_plan(&bytes, &LIMITS) {
            prop_assert!(plan.rows.len() <= LIMITS.max_rows as usize && plan.num_tokens() <= LIMITS.max_tokens as usize);
            let blocks = plan.rows.iter().flat_map(|row| &row.block_table);
            prop_assert!(blocks.copied().all(|block| block.0 < LIMITS.num_blocks));
        }
    }

    #[test]
    fn noise_is_refused(bytes in vec(any::<u8>(), 0..300)) {
        let _ = decode_plan(&bytes, &LIMITS);
        let _ = decode_output(&bytes, &LIMITS);
        let _ = decode_masks(&bytes, &LIMITS);
    }

    #[test]
    fn a_small_slot_is_an_error(plan in plan(), cut in 1usize..40) {
        let mut slot = vec![0; encoded(&plan).len().saturating_sub(cut)];
        prop_assert_eq!(encode_plan(&plan, &mut slot), Err(CodecError::NoRoom(slot.len())));
    }
}

#[test]
fn errors_name_the_field_and_the_limit() {
    let row = StepRow {
        sequence: SequenceId(1),
        token_ids: vec![1000],
        num_computed_tokens: 0,
        block_table: vec![BlockId(0)],
        sampling: Some(RowSampling::GREEDY),
    };
    let plan = |row: &StepRow| StepPlan {
        epoch: 1,
        step: 1,
        rows: vec![row.clone()],
        masks_follow: false,
    };
    let error = decode_plan(&encoded(&plan(&row)), &LIMITS).unwrap_err();
    assert_eq!(error.to_string(), "token_ids is 1000, limit 999");
    let row = StepRow {
        token_ids: vec![1],
        block_table: vec![BlockId(100)],
        ..row
    };
    let error = decode_plan(&encoded(&plan(&row)), &LIMITS).unwrap_err();
    assert_eq!(error.to_string(), "block_table is 100, limit 99");
    let sampling = RowSampling {
        temperature: f32::NAN,
        ..RowSampling::GREEDY
    };
    let row = StepRow {
        block_table: vec![BlockId(0)],
        sampling: Some(sampling),
        ..row
    };
    assert!(matches!(
        decode_plan(&encoded(&plan(&row)), &LIMITS),
        Err(CodecError::Invalid {
            field: "temperature",
            ..
        })
    ));
    // Two tokens, so that the message is not too short for two rows.
    let whole = StepRow {
        token_ids: vec![1, 2],
        sampling: None,
        ..row
    };
    let nowhere = StepRow {
        token_ids: vec![1],
        block_table: vec![],
        ..whole.clone()
    };
    let plan = StepPlan {
        rows: vec![nowhere, whole.clone()],
        ..plan(&whole)
    };
    assert_eq!(
        decode_plan(&encoded(&plan), &LIMITS),
        Err(CodecError::Invalid {
            field: "block_table",
            value: 0
        })
    );
}

//! Tests checks and unscaling against plain arithmetic, on host memory.

use half::{bf16, f16};

use super::*;
use crate::driver::DevicePtr;
use crate::dtype::Element;
use crate::launch::chunk_table::ChunkList;
use crate::units::StreamId;

fn span<T: Element>(values: &[T]) -> Span {
    // SAFETY: the tests keep the vectors alive and run kernels on their own thread.
    unsafe {
        Span::new(
            DevicePtr(values.as_ptr() as u64),
            values.len(),
            T::DTYPE,
            StreamId(0),
        )
    }
}

struct Found {
    flag: f32,
    norms: Vec<f64>,
    counts: Vec<u32>,
}

/// Runs the twin over whole tensors.
fn run(gradients: &[Span], inv: f32, kind: NormKind, write: bool) -> Found {
    let mut list = ChunkList::new("test", 1);
    list.restart(gradients.len());
    for (index, gradient) in gradients.iter().enumerate() {
        list.push(index, &[Some(*gradient)]).unwrap();
    }
    run_list(&list, gradients.len(), inv, kind, write)
}

fn run_list(list: &ChunkList, tensors: usize, inv: f32, kind: NormKind, write: bool) -> Found {
    let (inv, flag) = (vec![inv], vec![0f32]);
    let (norms, counts) = (vec![f64::NAN; tensors], vec![77u32; tensors * COUNT_WORDS]);
    let kernel = GradientCheck {
        table: list.host_table(),
        inv_scale: Some(span(&inv)),
        found_inf: span(&flag),
        stats: GradientStats {
            norms: span(&norms),
            counts: span(&counts),
        },
        kind,
        write,
    };
    // SAFETY: every operand is a live vector that nothing else accesses.
    unsafe { kernel.run() };
    Found {
        flag: std::hint::black_box(flag)[0],
        norms,
        counts,
    }
}

/// Values from -100 to 100, none of which overflows f16 when divided by 8.
fn noise(len: usize) -> Vec<f64> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let next = move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64 * 200.0 - 100.0
    };
    (0..len).map(next).collect()
}

fn unscales_like_f64<T: Element>() {
    for len in [0, 1, 7, BLOCK, BLOCK + 1, 100_003] {
        let values: Vec<T> = noise(len).into_iter().map(T::from_f64).collect();
        let before = values.clone();
        let found = run(&[span(&values)], 0.125, NormKind::L2, true);
        assert_eq!(found.flag, 0.0);
        assert_eq!(found.counts, [0, 0, !0, !0]);
        // A power of two is exact, except where f16 becomes subnormal.
        let expected: Vec<T> = before
            .iter()
            .map(|v| T::from_f64(v.to_f64() / 8.0))
            .collect();
        assert_eq!(values, expected);
        let sum: f64 = expected.iter().map(|v| v.to_f64() * v.to_f64()).sum();
        assert!(
            (found.norms[0] - sum).abs() <= 1e-12 * sum,
            "{} {sum}",
            found.norms[0]
        );
    }
}

#[test]
fn every_type_unscales_like_f64() {
    unscales_like_f64::<f16>();
    unscales_like_f64::<bf16>();
    unscales_like_f64::<f32>();
    unscales_like_f64::<f64>();
}

#[test]
fn a_check_reads_only_and_sees_the_product() {
    let values: Vec<f16> = noise(50_000).into_iter().map(f16::from_f64).collect();
    let before = values.clone();
    let found = run(&[span(&values)], 1.0 / 3.0, NormKind::L2, false);
    assert_eq!(values, before);
    let third = |v: &f16| f64::from(v.to_f32() * (1.0f32 / 3.0));
    let sum: f64 = before.iter().map(|v| third(v) * third(v)).sum();
    assert!((found.norms[0] - sum).abs() <= 1e-12 * sum);
}

#[test]
fn a_non_finite_value_anywhere_is_found_counted_and_placed() {
    for len in [1, 9, BLOCK + 5, 200_001] {
        for (bad, words) in [
            (f32::INFINITY, [1, 0]),
            (f32::NEG_INFINITY, [1, 0]),
            (f32::NAN, [0, 1]),
        ] {
            for place in [0, len / 2, len - 1] {
                let clean = vec![1f32; 3];
                let mut values = vec![2f32; len];
                values[place] = bad;
                let found = run(&[span(&clean), span(&values)], 0.5, NormKind::L2, false);
                assert_eq!(found.flag, 1.0);
                let place = u32::try_from(place).unwrap();
                assert_eq!(found.counts, [0, 0, !0, !0, words[0], words[1], place, 0]);
                assert_eq!(found.norms[0], 0.75);
            }
        }
    }
}

#[test]
fn counts_cover_all_and_the_first_is_the_lowest() {
    let mut values = vec![0f32; 150_000];
    for (index, value) in values.iter_mut().enumerate().skip(70_001).step_by(1_000) {
        *value = if index % 2 == 1 {
            f32::INFINITY
        } else {
            f32::NAN
        };
    }
    values[140_000] = f32::NAN;
    let found = run(&[span(&values)], 1.0, NormKind::L2, false);
    assert_eq!(found.counts, [80, 1, 70_001, 0]);
}

#[test]
fn norms_of_f32_neither_overflow_nor_lose_nan() {
    let values = vec![1e25f32, -1e25];
    assert!(
        (run(&[span(&values)], 1.0, NormKind::L2, false).norms[0].sqrt() / 2f64.sqrt() / 1e25
            - 1.0)
            .abs()
            < 1e-7
    );
    let values = vec![3f32, -4.0, 1.0];
    assert_eq!(run(&[span(&values)], 1.0, NormKind::L1, false).norms, [8.0]);
    assert_eq!(
        run(&[span(&values)], 1.0, NormKind::Max, false).norms,
        [4.0]
    );
    let values = vec![3f32, f32::NAN, 1.0];
    assert!(run(&[span(&values)], 1.0, NormKind::Max, false).norms[0].is_nan());
    let mut values = vec![3f32; 100_000];
    values[0] = f32::NAN;
    assert!(run(&[span(&values)], 1.0, NormKind::Max, false).norms[0].is_nan());
}

#[test]
fn large_f64_is_no_overflow_though_its_square_is() {
    let values = vec![1e300f64];
    let found = run(&[span(&values)], 0.5, NormKind::L2, true);
    assert_eq!((found.flag, values[0]), (0.0, 5e299));
    assert_eq!(found.norms, [f64::INFINITY]);
}

#[test]
fn the_flag_is_set_and_never_cleared() {
    let flag = vec![1f32];
    let values = vec![1f32];
    let mut list = ChunkList::new("test", 1);
    list.restart(1);
    list.push(0, &[Some(span(&values))]).unwrap();
    let (norms, counts) = (vec![0f64], vec![0u32; 4]);
    let kernel = GradientCheck {
        table: list.host_table(),
        inv_scale: None,
        found_inf: span(&flag),
        stats: GradientStats {
            norms: span(&norms),
            counts: span(&counts),
        },
        kind: NormKind::L2,
        write: false,
    };
    // SAFETY: every operand is a live vector that nothing else accesses.
    unsafe { kernel.run() };
    assert_eq!(std::hint::black_box(&flag)[0], 1.0);
}

#[test]
fn gaps_between_runs_are_neither_read_nor_written() {
    // [100, 5] out of [100, 8], with infinities in the gaps.
    let mut values = vec![f32::INFINITY; 800];
    for row in 0..100 {
        values[row * 8..][..5].fill(4.0);
    }
    let mut list = ChunkList::new("test", 1);
    list.restart(1);
    list.push_strided(0, &span(&values[..797]), &[100, 5], &[8, 1])
        .unwrap();
    let found = run_list(&list, 1, 0.25, NormKind::L2, true);
    assert_eq!((found.flag, found.norms[0]), (0.0, 500.0));
    assert_eq!(
        values[8..16],
        [
            1.0,
            1.0,
            1.0,
            1.0,
            1.0,
            f32::INFINITY,
            f32::INFINITY,
            f32::INFINITY
        ]
    );
}

#[test]
fn overflow_made_by_unscaling_is_found() {
    let values = vec![2e38f32];
    assert_eq!(run(&[span(&values)], 4.0, NormKind::L2, false).flag, 1.0);
    // The product is finite in f32; it overflows only when written back as f16.
    let values = vec![f16::from_f32(40_000.0)];
    assert_eq!(run(&[span(&values)], 2.0, NormKind::L2, false).flag, 0.0);
    assert_eq!(run(&[span(&values)], 2.0, NormKind::L2, true).flag, 1.0);
}

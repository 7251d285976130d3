//! Checks strided copies against a copy index by index.

use super::*;
use crate::launch::testing::{Array, numbers, rounded, run};
use crate::launch::tolerance::assert_same;

/// Copies index by index.
fn reference(copy: &StridedCopy<'_>, src: &[f64], dst: &mut [f64]) {
    for number in 0..copy.shape.iter().product() {
        let (mut rest, mut from, mut to) = (number, 0, 0);
        for d in (0..copy.shape.len()).rev() {
            let idx = rest % copy.shape[d];
            rest /= copy.shape[d];
            from += idx * copy.src_strides[d];
            to += idx * copy.dst_strides[d];
        }
        dst[to] = src[from];
    }
}

fn check(types: [DType; 2], shape: &[usize], src_strides: &[usize], dst_strides: &[usize]) {
    let span_len = |strides: &[usize]| {
        1 + shape
            .iter()
            .zip(strides)
            .map(|(n, stride)| (n - 1) * stride)
            .sum::<usize>()
    };
    let values = rounded(types[0], &numbers(1, span_len(src_strides), 1000.0));
    let src = Array::new(types[0], &values);
    let mut expected = vec![7.0; span_len(dst_strides)];
    let dst = Array::new(types[1], &expected);
    let (src_span, dst_span) = (src.span(), dst.span());
    let copy = StridedCopy {
        shape,
        src: &src_span,
        src_strides,
        dst: &dst_span,
        dst_strides,
    };
    run(&Strided::checked(&copy).unwrap().unwrap());
    reference(&copy, &rounded(types[1], &values), &mut expected);
    assert_same(&format!("{types:?} {copy:?}"), &dst.values(), &expected);
}

#[test]
fn layouts_of_all_kinds() {
    let layouts: [(&[usize], &[usize], &[usize]); 11] = [
        (&[], &[], &[]),
        (&[1], &[5], &[9]),
        (&[100], &[1], &[1]),
        (&[100], &[3], &[2]),
        (&[70, 90], &[1, 70], &[90, 1]),
        (&[70, 90], &[90, 1], &[1, 71]),
        (&[3, 4, 5], &[20, 5, 1], &[1, 3, 12]),
        (&[4, 6], &[0, 1], &[6, 1]),
        (&[2, 1, 3, 2], &[12, 99, 4, 2], &[6, 77, 2, 1]),
        (
            &[2, 2, 2, 2, 2, 2, 2, 2],
            &[1, 2, 4, 8, 16, 32, 64, 128],
            &[128, 64, 32, 16, 8, 4, 2, 1],
        ),
        (&[3000, 4], &[8, 1], &[4, 1]),
    ];
    for dtype in DType::ALL {
        for (shape, src, dst) in layouts {
            check([dtype; 2], shape, src, dst);
        }
    }
    for from in DType::ALL.into_iter().filter(|dtype| dtype.is_float()) {
        for to in DType::ALL.into_iter().filter(|dtype| dtype.is_float()) {
            for (shape, src, dst) in layouts {
                check([from, to], shape, src, dst);
            }
        }
    }
}

#[test]
fn large_enough_for_several_threads() {
    check([DType::F32; 2], &[300, 401], &[1, 300], &[401, 1]);
    check(
        [DType::F16, DType::F32],
        &[101, 3, 400],
        &[1600, 500, 1],
        &[1200, 400, 1],
    );
    check(
        [DType::F32, DType::F16],
        &[20_000, 3],
        &[5, 2],
        &[1, 20_000],
    );
}

/// Why a copy of these layouts between two spans of `len` f32 is refused.
fn refusal(shape: &[usize], src_strides: &[usize], dst_strides: &[usize], len: usize) -> String {
    let (src, dst) = (
        Array::filled(DType::F32, len),
        Array::filled(DType::F32, len),
    );
    let (src, dst) = (src.span(), dst.span());
    let copy = StridedCopy {
        shape,
        src: &src,
        src_strides,
        dst: &dst,
        dst_strides,
    };
    Strided::checked(&copy).unwrap_err().to_string()
}

#[test]
fn layouts_that_cannot_be_are_refused() {
    let outside = "reaches outside 6 elements";
    assert!(refusal(&[2, 3], &[3, 1], &[4, 1], 6).contains(outside));
    assert!(refusal(&[2, 3], &[3, 2], &[3, 1], 6).contains(outside));
    assert!(refusal(&[2, 3], &[usize::MAX, 1], &[3, 1], 6).contains(outside));
    assert!(refusal(&[usize::MAX, 3], &[2, 1], &[3, 1], 6).contains(outside));
    assert!(refusal(&[2, 3], &[3, 1], &[0, 1], 6).contains("twice"));
    assert!(refusal(&[2, 3], &[3, 1], &[2, 1], 6).contains("twice"));
    assert!(refusal(&[2, 3], &[3], &[3, 1], 6).contains("one stride"));
    assert!(refusal(&[1; 9], &[1; 9], &[1; 9], 6).contains("at most 8"));
}

#[test]
fn one_memory_on_both_sides() {
    let array = Array::new(DType::F32, &[1.0, 2.0, 3.0, 4.0]);
    let span = array.span();
    let half = |start| span.sub(start, 2);
    let copy = |src: Span, dst: Span| {
        let one = &[1][..];
        let shape = &[2][..];
        Strided::checked(&StridedCopy {
            shape,
            src: &src,
            src_strides: one,
            dst: &dst,
            dst_strides: one,
        })
    };
    assert!(
        copy(half(0), half(1))
            .unwrap_err()
            .to_string()
            .contains("overlaps")
    );
    // The spans overlap, but the elements that the copy reaches do not.
    run(&copy(span, half(2)).unwrap().unwrap());
    assert_eq!(array.values(), [1.0, 2.0, 1.0, 2.0]);
}

#[test]
fn nothing_to_copy() {
    let (src, dst) = (Array::filled(DType::F32, 0), Array::filled(DType::F32, 0));
    let (src, dst) = (src.span(), dst.span());
    let strides = &[1, 1][..];
    let copy = StridedCopy {
        shape: &[3, 0],
        src: &src,
        src_strides: strides,
        dst: &dst,
        dst_strides: strides,
    };
    assert!(Strided::checked(&copy).unwrap().is_none());
}

//! Copies between layouts.

use kitsune::DType;
use kitsune::launch::{self, StridedCopy};

use super::support::{Nearness, compare, floats, with_specials};

/// Shape, strides of the source, strides of the destination.
type Layout = (&'static [usize], &'static [usize], &'static [usize]);

const LAYOUTS: [Layout; 9] = [
    // Dense, a transpose, a broadcast, a slice, with gaps in the destination.
    (&[6, 7], &[7, 1], &[7, 1]),
    (&[33, 65], &[1, 33], &[65, 1]),
    (&[5, 9], &[0, 1], &[9, 1]),
    (&[4, 3], &[10, 1], &[3, 1]),
    (&[4, 3], &[3, 1], &[20, 5]),
    // No dimension, an empty one, and as many as there may be.
    (&[], &[], &[]),
    (&[3, 0], &[1, 1], &[1, 1]),
    (
        &[2, 3, 2, 2, 3, 2, 2, 2],
        &[1, 2, 6, 12, 24, 72, 144, 288],
        &[288, 96, 48, 24, 8, 4, 2, 1],
    ),
    (&[300, 5, 70], &[70, 21_000, 1], &[350, 70, 1]),
];

#[test]
fn strided_copies() {
    for (shape, src_strides, dst_strides) in LAYOUTS {
        let reach = |strides: &[usize]| -> usize {
            shape
                .iter()
                .zip(strides)
                .map(|(extent, stride)| extent * stride)
                .sum::<usize>()
                + 1
        };
        let pairs = floats().flat_map(|from| floats().map(move |to| (from, to)));
        for (from, to) in pairs.chain([(DType::U32, DType::U32)]) {
            compare(
                &format!("copy {from} {to} {shape:?}"),
                Nearness::Bits,
                |side| {
                    let src = side.array(from, 1, &with_specials(1, reach(src_strides), 5.0));
                    let dst = side.rubbish(to, 0, reach(dst_strides));
                    let copy = StridedCopy {
                        shape,
                        src: &src,
                        src_strides,
                        dst: &dst,
                        dst_strides,
                    };
                    launch::copy_strided(&side.stream, &copy).unwrap();
                    vec![dst]
                },
            );
        }
    }
}

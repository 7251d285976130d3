//! Kernels that compute each element by itself: all types, lengths and alignments, bit for bit.

use kitsune::launch::{self, Activation, Span};
use kitsune::{DType, F8E4M3, F8E5M2, Overflow};

use super::support::{
    LEADS, Nearness, Side, compare, floats, lengths, numbers, of_library, with_specials,
};

/// All pairs of float types with all lengths, and with alignments that differ between the operands.
fn for_cases(test: impl Fn(DType, DType, usize, [usize; 2])) {
    for_cases_of(&DType::FLOATS, test);
}

fn for_cases_of(dtypes: &[DType], test: impl Fn(DType, DType, usize, [usize; 2])) {
    for &from in dtypes {
        for &to in dtypes {
            for (number, len) in lengths().into_iter().enumerate() {
                let lead = LEADS[number % LEADS.len()];
                test(from, to, len, [lead, lead]);
                if len < 5000 {
                    test(from, to, len, [lead, (lead + 1) % 8]);
                }
            }
        }
    }
}

#[test]
fn casts() {
    let dtypes: Vec<_> = floats().collect();
    for_cases_of(&dtypes, |from, to, len, [lead, other]| {
        compare(&format!("cast {from} {to} {len}"), Nearness::Bits, |side| {
            let src = side.array(from, lead, &with_specials(1, len, 70_000.0));
            let dst = side.rubbish(to, other, len);
            launch::cast(&side.stream, &src, &dst).unwrap();
            vec![dst]
        });
    });
    compare("labels", Nearness::Bits, |side| {
        let src = side.array(DType::U32, 1, &[4e9, 0.0, 7.0]);
        let dst = side.rubbish(DType::U32, 0, 3);
        launch::cast(&side.stream, &src, &dst).unwrap();
        vec![dst]
    });
}

#[test]
fn saturating_casts() {
    for from in floats() {
        for to in DType::F8 {
            for (number, len) in lengths().into_iter().enumerate() {
                let lead = LEADS[number % LEADS.len()];
                for overflow in [Overflow::Infinity, Overflow::Saturate] {
                    let what = format!("{overflow:?} cast {from} {to} {len}");
                    compare(&what, Nearness::Bits, |side| {
                        let src = side.array(from, lead, &with_specials(1, len, 70_000.0));
                        let dst = side.rubbish(to, lead, len);
                        launch::cast_with(&side.stream, &src, &dst, overflow).unwrap();
                        vec![dst]
                    });
                }
            }
        }
    }
}

/// Every number of 8 and 16 bits, and the f32 and f64 around every midpoint between two.
#[test]
fn conversions_of_every_narrow_number() {
    for (half, codes) in [
        (DType::F16, 0x7c00u16),
        (DType::Bf16, 0x7f80),
        (DType::F8E4M3, 0x7f),
        (DType::F8E5M2, 0x7c),
    ] {
        let value = |code: u16| match half {
            DType::F16 => kitsune::f16::from_bits(code).to_f64(),
            DType::Bf16 => kitsune::bf16::from_bits(code).to_f64(),
            DType::F8E4M3 => F8E4M3::from_bits(u8::try_from(code).unwrap()).to_f64(),
            _ => F8E5M2::from_bits(u8::try_from(code).unwrap()).to_f64(),
        };
        let mut values = Vec::new();
        for code in 0..codes {
            let (low, high) = (value(code), value((code + 1).min(codes - 1)));
            let middle = f64::midpoint(low, high);
            values.extend([
                low,
                -low,
                middle,
                -middle,
                middle * (1.0 + 1e-12),
                middle * (1.0 - 1e-12),
            ]);
            values.extend([middle * (1.0 + 1e-7), middle * (1.0 - 1e-7)]);
        }
        // Around the tie with what would follow the largest, too.
        let step = value(codes - 1) - value(codes - 2);
        let tie = value(codes - 1) + step / 2.0;
        values.extend([tie, -tie, tie.next_up(), tie.next_down()]);
        values.extend([tie * (1.0 + 1e-7), tie * (1.0 - 1e-7)]);
        for wide in [DType::F32, DType::F64] {
            compare(&format!("{half} of {wide}"), Nearness::Bits, |side| {
                let src = side.array(wide, 0, &values);
                let dst = side.rubbish(half, 0, values.len());
                let back = side.rubbish(wide, 0, values.len());
                launch::cast(&side.stream, &src, &dst).unwrap();
                launch::cast(&side.stream, &dst, &back).unwrap();
                vec![dst, back]
            });
        }
    }
}

#[test]
fn fills() {
    for dtype in DType::ALL {
        for len in lengths() {
            for (number, value) in [3.3, -1.0, 1e12, f64::NAN, -0.0].into_iter().enumerate() {
                compare(
                    &format!("fill {dtype} {len} {value}"),
                    Nearness::Bits,
                    |side| {
                        let dst = side.rubbish(dtype, LEADS[number % LEADS.len()], len);
                        launch::fill(&side.stream, &dst, value).unwrap();
                        vec![dst]
                    },
                );
            }
        }
    }
}

type Binary = fn(&kitsune::Stream, &Span, &Span, &Span) -> kitsune::Result<()>;

#[test]
fn sums_and_products() {
    let ops: [(&str, Binary); 2] = [("add", launch::add), ("mul", launch::mul)];
    for (op, binary) in ops {
        for_cases(|first, second, len, [lead, other]| {
            // The output takes a type of its own in turn.
            let to = DType::FLOATS[len % DType::FLOATS.len()];
            compare(
                &format!("{op} {first} {second} {to} {len}"),
                Nearness::Bits,
                |side| {
                    let a = side.array(first, lead, &with_specials(2, len, 300.0));
                    let b = side.array(second, other, &with_specials(3, len, 300.0));
                    let (out, same) = (side.rubbish(to, lead, len), side.rubbish(first, lead, len));
                    binary(&side.stream, &a, &b, &out).unwrap();
                    binary(&side.stream, &a, &a, &same).unwrap();
                    binary(&side.stream, &a, &b, &a).unwrap();
                    vec![out, same, a]
                },
            );
        });
    }
}

#[test]
fn scaling() {
    for_cases(|from, to, len, [lead, other]| {
        compare(
            &format!("scale {from} {to} {len}"),
            Nearness::Bits,
            |side| {
                let x = side.array(from, lead, &with_specials(4, len, 100.0));
                let mut outputs = Vec::new();
                for dtype in [DType::F32, DType::F64] {
                    let factor = side.array(dtype, 0, &[1.0 / 3.0]);
                    let out = side.rubbish(to, other, len);
                    launch::scale(&side.stream, &x, &factor, &out).unwrap();
                    outputs.push(out);
                }
                let sum = side.array(to, other, &with_specials(5, len, 100.0));
                launch::add_scaled(&side.stream, &x, -0.3, &sum).unwrap();
                outputs.push(sum);
                outputs
            },
        );
    });
}

#[test]
fn activations() {
    for_cases(|from, to, len, [lead, other]| {
        for f in [Activation::Relu, Activation::Gelu] {
            compare(
                &format!("{f:?} {from} {to} {len}"),
                of_library([from, to]),
                |side| {
                    let x = side.array(from, lead, &with_specials(6, len, 6.0));
                    let grad = side.array(to, other, &with_specials(7, len, 3.0));
                    let (out, grad_in) =
                        (side.rubbish(to, other, len), side.rubbish(from, lead, len));
                    launch::activation(&side.stream, f, &x, &out).unwrap();
                    launch::activation_backward(&side.stream, f, &x, &grad, &grad_in).unwrap();
                    launch::activation_backward(&side.stream, f, &x, &grad, &grad).unwrap();
                    vec![out, grad_in, grad]
                },
            );
        }
    });
}

fn million(side: &Side, dtype: DType, seed: u64) -> Span {
    side.array(dtype, 1, &numbers(seed, 1_000_003, 100.0))
}

/// More than the largest grid takes at once: every thread goes on to a second pack.
#[test]
fn ten_million_elements() {
    compare("ten million", Nearness::Bits, |side| {
        let x = side.array(DType::F16, 0, &numbers(10, 10_000_007, 100.0));
        let out = side.rubbish(DType::F16, 0, x.len());
        launch::add(&side.stream, &x, &x, &out).unwrap();
        vec![out]
    });
}

#[test]
fn a_million_elements() {
    for dtype in [DType::F16, DType::F32] {
        compare(&format!("a million {dtype}"), Nearness::Bits, |side| {
            let (a, b) = (million(side, dtype, 8), million(side, dtype, 9));
            let out = side.rubbish(DType::Bf16, 3, a.len());
            launch::add(&side.stream, &a, &b, &b).unwrap();
            launch::cast(&side.stream, &b, &out).unwrap();
            vec![b, out]
        });
    }
}

//! Scaled conversions to and from 8 bits.

use kitsune::launch::{self, QuantizeTo};
use kitsune::{DType, F8E4M3, F8E5M2, Overflow};

use super::support::{LEADS, LENGTHS, Nearness, compare, large, numbers, with_specials};

/// Everything that quantizing `len` elements writes, twice, so that it goes on from what it finds.
fn quantized(dtypes: [DType; 2], len: usize, leads: [usize; 2], overflow: Overflow, scale: f64) {
    let [from, to] = dtypes;
    let what = format!("quantize {from} {to} {len} {overflow:?} {scale}");
    compare(&what, Nearness::Bits, |side| {
        let scale = side.array(DType::F32, 1, &[scale]);
        let inverse = side.rubbish(DType::F32, 0, 1);
        let amax = side.array(DType::F32, 1, &[0.0]);
        let counts = side.array(DType::F64, 0, &[1.0, 2.0, 3.0, 4.0, 5.0]);
        let bare = QuantizeTo {
            y: &side.rubbish(to, leads[1], len),
            scale: &scale,
            overflow,
            inverse: None,
            amax: None,
            counts: None,
        };
        let full = QuantizeTo {
            y: &side.rubbish(to, leads[1], len),
            inverse: Some(&inverse),
            amax: Some(&amax),
            counts: Some(&counts),
            ..bare
        };
        for (seed, to) in [(1, &full), (2, &full), (3, &bare)] {
            let x = side.array(from, leads[0], &with_specials(seed, len, 600.0));
            launch::quantize(&side.stream, &x, to).unwrap();
        }
        vec![*full.y, *bare.y, inverse, amax, counts]
    });
}

#[test]
fn quantizing() {
    for from in DType::FLOATS {
        for to in DType::F8 {
            for (number, len) in LENGTHS.into_iter().enumerate() {
                let lead = LEADS[number % LEADS.len()];
                quantized([from, to], len, [lead, lead], Overflow::Saturate, 1.1);
                quantized(
                    [from, to],
                    len,
                    [lead, (lead + 1) % 8],
                    Overflow::Infinity,
                    90.0,
                );
            }
        }
    }
    quantized(
        [DType::F32, DType::F8E4M3],
        large(),
        [0, 0],
        Overflow::Saturate,
        1.1,
    );
}

#[test]
fn largest_magnitudes() {
    for dtype in DType::FLOATS {
        for (number, len) in LENGTHS.into_iter().enumerate() {
            let lead = LEADS[number % LEADS.len()];
            compare(&format!("amax {dtype} {len}"), Nearness::Bits, |side| {
                let starts = [0.0, 0.5, f64::INFINITY, f64::NAN];
                let amaxes = starts.map(|start| side.array(DType::F32, 1, &[start]));
                for amax in &amaxes {
                    let x = side.array(dtype, lead, &numbers(4, len, 7.0));
                    launch::amax(&side.stream, &x, amax).unwrap();
                }
                let special = side.array(DType::F32, 0, &[0.0]);
                let x = side.array(dtype, lead, &with_specials(5, len, 7.0));
                launch::amax(&side.stream, &x, &special).unwrap();
                vec![amaxes[0], amaxes[1], amaxes[2], amaxes[3], special]
            });
        }
    }
}

#[test]
fn dequantizing() {
    for from in DType::F8 {
        let value = |number: usize| match from {
            DType::F8E4M3 => F8E4M3::from_bits(number.to_le_bytes()[0]).to_f64(),
            _ => F8E5M2::from_bits(number.to_le_bytes()[0]).to_f64(),
        };
        for to in DType::FLOATS {
            for (number, len) in LENGTHS.into_iter().enumerate() {
                let lead = LEADS[number % LEADS.len()];
                compare(
                    &format!("dequantize {from} {to} {len}"),
                    Nearness::Bits,
                    |side| {
                        let values: Vec<_> = (0..len).map(value).collect();
                        let x = side.array(from, lead, &values);
                        let inverse = side.array(DType::F32, 0, &[1.0 / 3.0]);
                        let y = side.rubbish(to, (lead + number) % 8, len);
                        launch::dequantize(&side.stream, &x, &inverse, &y).unwrap();
                        vec![y]
                    },
                );
            }
        }
    }
}

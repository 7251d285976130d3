//! Scaled conversions to and from 8 bits.

use kitsune::amp::fp8::{AmaxAlgorithm, Fp8Config, Fp8Scaler};
use kitsune::launch::{self, QuantizeTo, Span};
use kitsune::{Context, DType, Device, F8E4M3, F8E5M2, HostConfig, Overflow, Tensor};

use super::places::{BAD, LEN, PLACES, assert_stay, same_kind, spoiled_at};
use super::support::{
    LEADS, Nearness, Side, compare, large, lengths, numbers, on_each, with_specials,
};
use crate::support::device::with_kernels;

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
            for (number, len) in lengths().into_iter().enumerate() {
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
        for (number, len) in lengths().into_iter().enumerate() {
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
            for (number, len) in lengths().into_iter().enumerate() {
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

/// What is not finite becomes NaN, or the largest number if that is asked for; nothing else does. The largest magnitude
/// and the counts tell of it wherever it was.
#[test]
fn elements_that_are_not_finite_stay_where_they_are() {
    for dtype in DType::FLOATS {
        for narrow in DType::F8 {
            // e4m3 has no infinities.
            let becomes = |x: f64| match narrow {
                DType::F8E4M3 if x.is_infinite() => f64::NAN,
                _ => x,
            };
            assert_stay("quantize", [dtype, narrow], becomes, |side, x, y| {
                quantize_alone(side, x, y, Overflow::Infinity);
            });
            let saturated = |x: f64| if x.is_nan() { x } else { 1.0 };
            assert_stay("quantize", [dtype, narrow], saturated, |side, x, y| {
                quantize_alone(side, x, y, Overflow::Saturate);
            });
            assert_stay("dequantize", [narrow, dtype], becomes, |side, x, y| {
                let inverse = side.array(DType::F32, 0, &[0.5]);
                launch::dequantize(&side.stream, x, &inverse, y).unwrap();
            });
        }
        for (number, place) in PLACES.into_iter().enumerate() {
            let (bad, lead) = (BAD[number % 3], number % 4);
            let outputs = on_each(|side| {
                let x = side.array(dtype, lead, &spoiled_at(place, bad));
                let [amax, also] = [(); 2].map(|()| side.array(DType::F32, 0, &[0.0]));
                let counts = side.array(DType::F64, 0, &[0.0; 5]);
                launch::amax(&side.stream, &x, &amax).unwrap();
                let y = side.rubbish(DType::F8E5M2, lead, LEN);
                let scale = side.array(DType::F32, 0, &[1.0]);
                let full = QuantizeTo {
                    y: &y,
                    scale: &scale,
                    overflow: Overflow::Saturate,
                    inverse: None,
                    amax: Some(&also),
                    counts: Some(&counts),
                };
                launch::quantize(&side.stream, &x, &full).unwrap();
                vec![amax, also, counts]
            });
            for output in outputs {
                let what = format!("{dtype} {bad} at {place}: {output:?}");
                let largest = bad.abs();
                assert!(
                    output[..2].iter().all(|amax| same_kind(amax[0], largest)),
                    "{what}"
                );
                let is_nan = f64::from(u8::from(bad.is_nan()));
                assert_eq!(
                    output[2][..4],
                    [LEN as f64, 1.0 - is_nan, 0.0, is_nan],
                    "{what}"
                );
            }
        }
    }
}

/// Quantizes by a scale of 1, with nothing beside.
fn quantize_alone(side: &Side, x: &Span, y: &Span, overflow: Overflow) {
    let scale = side.array(DType::F32, 0, &[1.0]);
    let to = QuantizeTo {
        y,
        scale: &scale,
        overflow,
        inverse: None,
        amax: None,
        counts: None,
    };
    launch::quantize(&side.stream, x, &to).unwrap();
}

/// Scales and histories after iterations of every kind, on this device.
fn scales(device: &Device, config: &Fp8Config) -> String {
    let context = Context::new(device).unwrap();
    let tensors = [
        ("a", DType::F8E4M3),
        ("b", DType::F8E5M2),
        ("c", DType::F8E4M3),
    ];
    let mut scaler = Fp8Scaler::new(&context, config.clone(), &tensors).unwrap();
    let mut random = fastrand::Rng::with_seed(12);
    let mut state = scaler.state_dict().unwrap();
    for saved in &mut state.tensors {
        for amax in &mut saved.history[1..] {
            *amax = random.f32() * 9.0;
        }
    }
    scaler.load_state_dict(&state).unwrap();
    for amax in [5.0, 0.3, f32::INFINITY, 0.0, 20.0, f32::NAN, 1e-40, 7.7] {
        for (place, (name, _)) in tensors.iter().enumerate() {
            // The third is not converted in every iteration.
            if place < 2 || amax > 1.0 {
                let x = Tensor::from_slice(&context, [2], &[amax, 0.1]).unwrap();
                scaler.quantize(name, &x).unwrap();
            }
        }
        scaler.update().unwrap();
    }
    format!(
        "{:?} {:?}",
        scaler.state_dict().unwrap(),
        scaler.stats().unwrap()
    )
}

#[test]
fn updates_of_scales() {
    let host = Device::host(HostConfig::default()).unwrap();
    let kernels = with_kernels(&host);
    for history_length in [1, 2, 3, 255, 256, 257, 1024] {
        for algorithm in [AmaxAlgorithm::Max, AmaxAlgorithm::MostRecent] {
            for (margin, power_of_two) in [(0, false), (2, true)] {
                let delayed = Fp8Config {
                    history_length,
                    algorithm,
                    margin,
                    power_of_two,
                    ..Fp8Config::default()
                };
                let current = Fp8Config {
                    margin,
                    power_of_two,
                    epsilon: 0.2,
                    ..Fp8Config::current()
                };
                for config in [delayed, current] {
                    let expected = scales(&host, &config);
                    for reversed in [false, true] {
                        kitsune_shim::reverse(reversed);
                        assert_eq!(scales(&kernels, &config), expected, "{config:?} {reversed}");
                    }
                    kitsune_shim::reverse(false);
                }
            }
        }
    }
}

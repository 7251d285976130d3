//! Checks both types against f64 arithmetic: every code, the values around every midpoint, every f16 and bf16.

use super::*;
use crate::dtype::{bf16, f16};

/// A type under test, and a table of its values computed from the definition.
struct Case {
    name: &'static str,
    /// Finite magnitudes by code.
    numbers: Vec<f64>,
    /// The value that would follow the largest.
    next: f64,
    overflow: u8,
    from_f32: fn(f32) -> u8,
    from_f64: fn(f64) -> u8,
    saturating_from_f32: fn(f32) -> u8,
    saturating_from_f64: fn(f64) -> u8,
    to_f32: fn(u8) -> f32,
    to_f64: fn(u8) -> f64,
}

/// (1 + m / 2^f) · 2^(e - bias), or m / 2^f · 2^(1 - bias) where e is 0.
fn value(code: u8, fraction_bits: u32, bias: i32) -> f64 {
    let steps = f64::from(1 << fraction_bits);
    let fraction = f64::from(u32::from(code) % (1 << fraction_bits)) / steps;
    let exponent = i32::from(code) >> fraction_bits;
    if exponent == 0 {
        return fraction * 2f64.powi(1 - bias);
    }
    (1.0 + fraction) * 2f64.powi(exponent - bias)
}

fn cases() -> [Case; 2] {
    [
        Case {
            name: "e4m3",
            numbers: (0..0x7f).map(|code| value(code, 3, 7)).collect(),
            next: value(0x7f, 3, 7),
            overflow: 0x7f,
            from_f32: |value| F8E4M3::from_f32(value).to_bits(),
            from_f64: |value| F8E4M3::from_f64(value).to_bits(),
            saturating_from_f32: |value| F8E4M3::saturating_from_f32(value).to_bits(),
            saturating_from_f64: |value| F8E4M3::saturating_from_f64(value).to_bits(),
            to_f32: |code| F8E4M3::from_bits(code).to_f32(),
            to_f64: |code| F8E4M3::from_bits(code).to_f64(),
        },
        Case {
            name: "e5m2",
            numbers: (0..0x7c).map(|code| value(code, 2, 15)).collect(),
            next: value(0x7c, 2, 15),
            overflow: 0x7c,
            from_f32: |value| F8E5M2::from_f32(value).to_bits(),
            from_f64: |value| F8E5M2::from_f64(value).to_bits(),
            saturating_from_f32: |value| F8E5M2::saturating_from_f32(value).to_bits(),
            saturating_from_f64: |value| F8E5M2::saturating_from_f64(value).to_bits(),
            to_f32: |code| F8E5M2::from_bits(code).to_f32(),
            to_f64: |code| F8E5M2::from_bits(code).to_f64(),
        },
    ]
}

impl Case {
    fn largest(&self) -> u8 {
        u8::try_from(self.numbers.len() - 1).unwrap()
    }

    /// The code of the number nearest to `value`, ties to the even code. f64 represents every midpoint exactly.
    fn nearest(&self, value: f64, overflow: Overflow) -> u8 {
        let sign = u8::from(value.is_sign_negative()) << 7;
        if value.is_nan() {
            return sign | 0x7f;
        }
        let magnitude = value.abs();
        let above = self.numbers.partition_point(|number| *number <= magnitude);
        let low = u8::try_from(above - 1).unwrap();
        let next = self.numbers.get(above).copied().unwrap_or(self.next);
        let middle = f64::midpoint(self.numbers[above - 1], next);
        let up = magnitude > middle || magnitude == middle && low % 2 == 1;
        let code = low + u8::from(up);
        sign | match overflow {
            _ if code <= self.largest() => code,
            Overflow::Infinity => self.overflow,
            Overflow::Saturate => self.largest(),
        }
    }

    #[track_caller]
    fn check_f64(&self, value: f64) {
        let wanted = [Overflow::Infinity, Overflow::Saturate].map(|o| self.nearest(value, o));
        let got = [(self.from_f64)(value), (self.saturating_from_f64)(value)];
        assert_eq!(got, wanted, "{} of {value:e} in f64", self.name);
    }

    #[track_caller]
    fn check_f32(&self, value: f32) {
        let exact = f64::from(value);
        let wanted = [Overflow::Infinity, Overflow::Saturate].map(|o| self.nearest(exact, o));
        let got = [(self.from_f32)(value), (self.saturating_from_f32)(value)];
        assert_eq!(got, wanted, "{} of {value:e} in f32", self.name);
        self.check_f64(exact);
    }
}

#[test]
fn every_code_is_its_number_and_comes_back() {
    for case in cases() {
        for code in 0..=u8::MAX {
            let (single, double) = ((case.to_f32)(code), (case.to_f64)(code));
            let magnitude = usize::from(code & 0x7f);
            match case.numbers.get(magnitude) {
                Some(number) => {
                    assert_eq!(double.abs(), *number, "{} {code:#x}", case.name);
                    assert_eq!(double.is_sign_negative(), code >= 0x80, "{code:#x}");
                    assert_eq!((case.from_f64)(double), code);
                    assert_eq!((case.saturating_from_f32)(single), code);
                }
                None if magnitude == 0x7c => assert_eq!(double.abs(), f64::INFINITY),
                None => assert!(double.is_nan(), "{} {code:#x}", case.name),
            }
            assert_eq!(f64::from(single).to_bits(), double.to_bits(), "{code:#x}");
            case.check_f32(single);
        }
    }
}

#[test]
fn around_every_midpoint_and_number() {
    for case in cases() {
        let next = case.numbers[1..].iter().chain([&case.next]);
        for (low, high) in case.numbers.iter().zip(next) {
            let middle = f64::midpoint(*low, *high);
            for value in [*low, middle, *high] {
                for value in [value, -value] {
                    for value in [value, value.next_up(), value.next_down()] {
                        case.check_f64(value);
                    }
                    #[expect(clippy::cast_possible_truncation, reason = "f32 holds midpoints")]
                    let single = value as f32;
                    assert_eq!(f64::from(single), value);
                    for value in [single, single.next_up(), single.next_down()] {
                        case.check_f32(value);
                    }
                }
            }
        }
    }
}

#[test]
fn every_half_and_a_spread_of_f32_and_f64() {
    for case in cases() {
        for bits in 0..=u16::MAX {
            case.check_f32(f16::from_bits(bits).to_f32());
            case.check_f32(bf16::from_bits(bits).to_f32());
            // A prime step through all exponents.
            case.check_f32(f32::from_bits(u32::from(bits).wrapping_mul(65_537 + 30)));
            case.check_f64(f64::from_bits(
                u64::from(bits).wrapping_mul(281_487_861_678_007),
            ));
        }
        for value in [
            f64::MAX,
            1e300,
            1e-300,
            f64::MIN_POSITIVE,
            5e-324,
            f64::INFINITY,
        ] {
            case.check_f64(value);
            case.check_f64(-value);
        }
    }
}

/// Results of PyTorch 2.15 on the CPU, which saturates e4m3 but not e5m2.
#[test]
fn vectors_recorded_from_pytorch() {
    let tiny = 2f32.powi(-10);
    let cases = [
        (464.0, 448.0),
        (1000.0, 448.0),
        (1e30, 448.0),
        (f32::INFINITY, 448.0),
        (tiny, 0.0),
        (tiny.next_up(), 2f32.powi(-9)),
        (17.0, 16.0),
        (19.0, 20.0),
    ];
    for (value, expected) in cases {
        assert_eq!(
            F8E4M3::saturating_from_f32(value).to_f32(),
            expected,
            "{value}"
        );
    }
    assert_eq!(F8E4M3::saturating_from_f32(f32::NAN).to_bits(), 0x7f);
    assert_eq!(F8E5M2::from_f32(61_439.0), F8E5M2::MAX);
    assert_eq!(F8E5M2::from_f32(61_440.0), F8E5M2::INFINITY);
    assert_eq!(F8E5M2::from_f32(-1e30), F8E5M2::NEG_INFINITY);
    // The other overflow mode of each type.
    assert_eq!(F8E4M3::from_f32(464.0), F8E4M3::MAX);
    assert!(F8E4M3::from_f32(464f32.next_up()).is_nan());
    assert!(F8E4M3::from_f32(f32::INFINITY).is_nan());
    assert_eq!(F8E5M2::saturating_from_f32(f32::INFINITY), F8E5M2::MAX);
    assert_eq!(F8E5M2::saturating_from_f32(-61_440.0).to_f32(), -57_344.0);
}

/// Hashes of the codes that PyTorch 2.15 returns on the CPU for all f16 and all bf16, in the order of their bits.
#[test]
fn every_half_is_converted_as_pytorch_does() {
    fn sum(code: impl Fn(u16) -> u8) -> u64 {
        // FNV-1a (Fowler, Noll and Vo), in 64 bits.
        (0..=u16::MAX).fold(0xcbf2_9ce4_8422_2325, |sum: u64, bits| {
            (sum ^ u64::from(code(bits))).wrapping_mul(0x100_0000_01b3)
        })
    }
    let of_f16 = |bits| f16::from_bits(bits).to_f32();
    let of_bf16 = |bits| bf16::from_bits(bits).to_f32();
    let e4m3 = |value| F8E4M3::saturating_from_f32(value).to_bits();
    let e5m2 = |value| F8E5M2::from_f32(value).to_bits();
    assert_eq!(sum(|bits| e4m3(of_f16(bits))), 0x2d72_4a81_49ff_1225);
    assert_eq!(sum(|bits| e5m2(of_f16(bits))), 0x087c_cdde_80d9_3f25);
    assert_eq!(sum(|bits| e4m3(of_bf16(bits))), 0xf9de_a88c_05be_79a5);
    assert_eq!(sum(|bits| e5m2(of_bf16(bits))), 0xe1c1_40aa_89ae_5765);
}

#[test]
fn comparisons_are_those_of_numbers() {
    assert_eq!(F8E4M3::default(), F8E4M3::from_f32(-0.0));
    assert_ne!(F8E4M3::NAN, F8E4M3::NAN);
    assert!(F8E5M2::from_f32(-2.0) < F8E5M2::MIN_POSITIVE_SUBNORMAL);
    assert!(F8E5M2::MAX < F8E5M2::INFINITY);
    assert!(F8E4M3::MAX.is_finite() && !F8E4M3::NAN.is_finite() && F8E4M3::NAN.is_nan());
    assert!(!F8E5M2::INFINITY.is_finite() && !F8E5M2::INFINITY.is_nan());
    assert_eq!(F8E4M3::ONE.to_string(), "1");
    assert_eq!(format!("{:?}", F8E5M2::from_f32(-1.3)), "-1.25");
}

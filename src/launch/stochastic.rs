//! Stochastic rounding to bf16: up or down with probabilities such that the expected result is the value.
//!
//! The random bits come from Philox2x32 with seven rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2,
//! 3", 2011), a function of a key and a counter. It keeps no state between calls, so every device, order and number of
//! threads produces the same bits. The key is made of seed, tensor and step; the counter is the element's index. Each
//! element has 16 random bits for each of up to three values: as many bits as bf16 cuts off.
//!
//! Twin of `kernels/stochastic.cuh`.

use crate::dtype::bf16;
use crate::launch::compute::{CHUNK as BLOCK, Compute};
use crate::launch::vector::vectorized;

/// The number of rounds from which the paper found no statistical flaw.
const ROUNDS: u32 = 7;
const MULTIPLIER: u32 = 0xd256_d193;
/// The golden ratio, added to the key in each round.
const WEYL: u32 = 0x9e37_79b9;

/// Finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The key for all elements of a tensor in one step.
pub(super) fn random_key(seed: u64, tensor: u64, step: u32) -> u64 {
    mix(mix(mix(seed) ^ tensor) ^ u64::from(step))
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "halves of 64 bits")]
fn philox([mut left, mut right]: [u32; 2], mut key: u32) -> [u32; 2] {
    for _ in 0..ROUNDS {
        let product = u64::from(MULTIPLIER) * u64::from(left);
        left = (product >> 32) as u32 ^ key ^ right;
        right = product as u32;
        key = key.wrapping_add(WEYL);
    }
    [left, right]
}

/// The random bits of a block of elements.
pub(super) struct Chances {
    left: [u32; BLOCK],
    right: [u32; BLOCK],
}

impl Chances {
    /// The random bits of `len` elements from index `first` on, for `key`.
    #[expect(clippy::cast_possible_truncation, reason = "halves of 64 bits")]
    pub(super) fn new(key: u64, first: u64, len: usize) -> Self {
        let mut chances = Self {
            left: [0; BLOCK],
            right: [0; BLOCK],
        };
        let Self { left, right } = &mut chances;
        let above = (key >> 32) as u32;
        // The upper half of the index can change within a block, once in 2^32 elements.
        let turn =
            (u64::from(u32::MAX) + 1 - (first & u64::from(u32::MAX))).min(len as u64) as usize;
        let (near, far) = (first, first.wrapping_add(turn as u64));
        for (range, start) in [(0..turn, near), (turn..len, far)] {
            let counter = [start as u32, (start >> 32) as u32 ^ above];
            fill(
                counter,
                key as u32,
                &mut left[range.clone()],
                &mut right[range],
            );
        }
        chances
    }

    /// Rounds `values`: for each element of the block, its value number `which` (0 to 2).
    pub(super) fn round<C: Compute>(&self, which: usize, values: &[C], into: &mut [bf16]) {
        let (words, shift) = match which {
            0 => (&self.left, 0),
            1 => (&self.left, 16),
            _ => (&self.right, 0),
        };
        round(values, &words[..values.len()], shift, into);
    }
}

vectorized! {
    fn fill(counter: [u32; 2], key: u32, left: &mut [u32], right: &mut [u32]) {
        let [mut index, above] = counter;
        for (left, right) in left.iter_mut().zip(right) {
            [*left, *right] = philox([index, above], key);
            index = index.wrapping_add(1);
        }
    }
}

vectorized! {
    fn round<C: Compute>(values: &[C], words: &[u32], shift: u32, into: &mut [bf16]) {
        for ((value, word), into) in values.iter().zip(words).zip(into) {
            *into = by_chance(value.to_f32(), (*word >> shift) & 0xffff);
        }
    }
}

/// `value` rounded up in magnitude if adding `chance`, from 0 to 65,535, to the lower bits carries. A finite value
/// never becomes infinite: past the largest bf16 it is truncated.
#[inline(always)]
fn by_chance(value: f32, chance: u32) -> bf16 {
    let bits = value.to_bits();
    let is_cut = bits & 0x7fff_ffff >= 0x7f7f_0000;
    let rounded = bits.wrapping_add(if is_cut { 0 } else { chance }) >> 16;
    let quiet = (bits >> 16) | 0x40;
    let kept = if value.is_nan() { quiet } else { rounded };
    #[expect(clippy::cast_possible_truncation, reason = "both have 16 bits left")]
    bf16::from_bits(kept as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_gives_the_published_vectors() {
        // From `kat_vectors` of Random123, the authors' own code.
        assert_eq!(philox([0, 0], 0), [0x257a_3673, 0xcd26_be2a]);
        let ones = u32::MAX;
        assert_eq!(philox([ones, ones], ones), [0xab30_2c4d, 0x3dc9_d239]);
        let pi = [0x243f_6a88, 0x85a3_08d3];
        assert_eq!(philox(pi, 0x1319_8a2e), [0xbedb_be6b, 0xe4c7_70b3]);
    }

    #[test]
    fn a_block_has_the_chances_of_its_elements() {
        let key = random_key(3, 5, 7);
        for first in [0, 17, u64::from(u32::MAX) - 2, 1 << 40] {
            let block = Chances::new(key, first, 9);
            for at in 0..9u32 {
                let index = first + u64::from(at);
                #[expect(clippy::cast_possible_truncation, reason = "halves of 64 bits")]
                let expected = philox(
                    [index as u32, (index >> 32) as u32 ^ (key >> 32) as u32],
                    key as u32,
                );
                let got = [block.left[at as usize], block.right[at as usize]];
                assert_eq!(got, expected, "{index}");
            }
        }
    }

    /// Over all 65,536 chances, the share that rounds up is exactly the fraction of a unit in the last place.
    #[test]
    fn of_all_chances_the_right_share_rounds_up() {
        for bits in [
            0x3f80_0001u32,
            0x3f80_8000,
            0x3f80_ffff,
            0xc049_1234,
            0x0000_4321,
            0x3fff_8000,
        ] {
            let value = f32::from_bits(bits);
            let ups = (0..=0xffff)
                .filter(|chance| u32::from(by_chance(value, *chance).to_bits()) != bits >> 16);
            assert_eq!(ups.count(), (bits & 0xffff) as usize, "{value:e}");
        }
    }

    #[test]
    fn what_bf16_holds_stays_and_nothing_finite_overflows() {
        for chance in [0, 1, 0x7fff, 0xffff] {
            for bits in (0..=u16::MAX).filter(|bits| !bf16::from_bits(*bits).is_nan()) {
                let value = bf16::from_bits(bits).to_f32();
                assert_eq!(by_chance(value, chance).to_bits(), bits);
            }
            assert_eq!(by_chance(f32::MAX, chance), bf16::MAX);
            assert_eq!(by_chance(f32::MIN, chance), bf16::MIN);
            assert!(by_chance(f32::NAN, chance).is_nan());
            assert!(by_chance(f32::from_bits(0x7f80_0001), chance).is_nan());
        }
    }

    /// The mean over many elements, seeds, tensors and steps is the value, within 5 standard deviations.
    #[test]
    fn the_mean_is_the_value() {
        const LEN: usize = BLOCK;
        let value = 1.0f32 + 0.3 / 128.0;
        let values = [value; LEN];
        for vary in 0..4u64 {
            for which in 0..3 {
                let (mut ups, mut count) = (0u32, 0u32);
                for round in 0..64u64 {
                    let vary = |number| if vary == number { round } else { 9 };
                    let step = u32::try_from(vary(2)).unwrap();
                    let key = random_key(vary(0), vary(1), step);
                    let chances = Chances::new(key, vary(3) * LEN as u64, LEN);
                    let mut rounded = [bf16::ZERO; LEN];
                    chances.round(which, &values, &mut rounded);
                    ups += rounded
                        .iter()
                        .map(|one| u32::from(*one > bf16::ONE))
                        .sum::<u32>();
                    count += u32::try_from(LEN).unwrap();
                }
                let share = f64::from(value.to_bits() & 0xffff) / 65_536.0;
                let deviation = (share * (1.0 - share) / f64::from(count)).sqrt();
                let mean = f64::from(ups) / f64::from(count);
                assert!(
                    (mean - share).abs() < 5.0 * deviation,
                    "{vary} {which}: {mean} {share}"
                );
            }
        }
    }

    /// Rounds the same values as each of an element's three values.
    #[test]
    fn the_numbers_of_an_element_have_chances_of_their_own() {
        let chances = Chances::new(7, 0, BLOCK);
        let values = [1.0f32 + 1.0 / 256.0; BLOCK];
        let rounded = [0, 1, 2].map(|which| {
            let mut into = [bf16::ZERO; BLOCK];
            chances.round(which, &values, &mut into);
            into
        });
        assert!(rounded[0] != rounded[1] && rounded[1] != rounded[2] && rounded[0] != rounded[2]);
    }
}

//! The random numbers of RMM's benchmarks, bit for bit.
//!
//! RMM draws from `std::default_random_engine` through `std::uniform_int_distribution`, as implemented by libstdc++.
//! The engine is Lehmer's generator with factor 16,807 modulo 2^31 - 1. The distribution scales down by division or
//! combines two draws, and rejects draws that would introduce a bias.

const FACTOR: u64 = 16_807;
const MODULUS: u64 = (1 << 31) - 1;
/// The engine returns 1 to this; the distribution sees numbers from 0 to one less.
const MOST: u64 = MODULUS - 1;

/// The engine that libstdc++ calls `minstd_rand0`.
#[derive(Clone, Debug)]
pub(super) struct MinStd {
    state: u64,
}

impl MinStd {
    /// An engine with a seed. Seed 0 gives the same sequence as 1, which is also that of a default-constructed engine.
    pub(super) fn new(seed: u64) -> Self {
        // State 0 would stay 0, so libstdc++ replaces it.
        let state = match seed % MODULUS {
            0 => 1,
            state => state,
        };
        Self { state }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state * FACTOR % MODULUS;
        self.state
    }

    /// A number from `first` to `last`, inclusive.
    pub(super) fn uniform(&mut self, first: u64, last: u64) -> u64 {
        first + self.up_to(last - first)
    }

    /// A number from 0 to `last`.
    fn up_to(&mut self, last: u64) -> u64 {
        let engine_last = MOST - 1;
        if last == engine_last {
            return self.next() - 1;
        }
        if last < engine_last {
            let scale = engine_last / (last + 1);
            let end = scale * (last + 1);
            loop {
                let drawn = self.next() - 1;
                if drawn < end {
                    return drawn / scale;
                }
            }
        }
        loop {
            let high = MOST.wrapping_mul(self.up_to(last / MOST));
            let sum = high.wrapping_add(self.next() - 1);
            if sum <= last && sum >= high {
                return sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recorded from a C++ program with libstdc++ 12: `std::uniform_int_distribution<size_t>(first, last)` on a default
    /// engine, four draws of each range in this order.
    #[test]
    fn numbers_are_those_of_libstdcxx() {
        let mut engine = MinStd::new(0);
        let mut four = |first, last| [(); 4].map(|()| engine.uniform(first, last));
        assert_eq!(four(0, 99), [0, 13, 75, 45]);
        assert_eq!(four(1, 1 << 20), [558_920, 229_708, 49_354, 712_189]);
        assert_eq!(
            four(1, 4096 << 20),
            [3_262_921_811, 1_137_522_503, 2_291_026_258, 3_622_316_815]
        );
        assert_eq!(four(0, 999), [588, 930, 846, 526]);
    }

    #[test]
    fn the_engine_is_minstd_rand0() {
        // The C++ standard gives the ten-thousandth number.
        let mut engine = MinStd::new(1);
        let last = (0..10_000).map(|_| engine.next()).last();
        assert_eq!(last, Some(1_043_618_065));
    }
}

//! The order in which images are shown: every image once an epoch, in an order that the seed gives.

use crate::random::Random;

/// Batches of equal size without end. What is left over at the end of an epoch is not shown in it: equal
/// sizes mean that every step asks for the same memory.
#[derive(Debug)]
pub(crate) struct Batches {
    order: Vec<usize>,
    size: usize,
    next: usize,
    random: Random,
}

impl Batches {
    /// Batches of `size` out of `count` images.
    ///
    /// # Panics
    /// Unless `1 <= size <= count`.
    pub(crate) fn new(count: usize, size: usize, seed: u64) -> Self {
        assert!(
            (1..=count).contains(&size),
            "a batch of {size} out of {count} images"
        );
        Self {
            order: (0..count).collect(),
            size,
            // Past the end: the first batch begins an epoch.
            next: count,
            random: Random::new(seed),
        }
    }

    /// The images of the next batch.
    pub(crate) fn advance(&mut self) -> &[usize] {
        if self.next + self.size > self.order.len() {
            self.random.shuffle(&mut self.order);
            self.next = 0;
        }
        let batch = &self.order[self.next..self.next + self.size];
        self.next += self.size;
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_shows_no_image_twice() {
        let mut batches = Batches::new(10, 3, 1);
        for _ in 0..4 {
            let mut seen: Vec<_> = (0..3).flat_map(|_| batches.advance().to_vec()).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 9);
        }
    }

    #[test]
    fn the_seed_gives_the_order() {
        let order = |seed| {
            let mut batches = Batches::new(50, 10, seed);
            (0..20)
                .flat_map(|_| batches.advance().to_vec())
                .collect::<Vec<_>>()
        };
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
        assert_ne!(order(1)[..50], order(1)[50..100]);
    }
}

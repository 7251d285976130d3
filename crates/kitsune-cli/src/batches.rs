//! The order in which images are used: every image once per epoch, in an order that the seed determines.

use serde::{Deserialize, Serialize};

use crate::random::Random;

/// An endless sequence of batches of equal size. Images left over at the end of an epoch are skipped: with equal sizes,
/// every step requests the same memory.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
            // At the end, so that the first batch starts an epoch.
            next: count,
            random: Random::new(seed),
        }
    }

    /// Continues from `saved`. Returns whether `saved` was made for the same number of images; if not, a new epoch
    /// starts, in an order derived from `saved`.
    ///
    /// # Errors
    /// Says what is invalid. Nothing was changed.
    pub(crate) fn go_on_from(&mut self, saved: Self) -> Result<bool, String> {
        let count = saved.order.len();
        if saved.size != self.size || count < saved.size {
            return Err(format!(
                "batches of {} out of {count}, not of {}",
                saved.size, self.size
            ));
        }
        let mut sorted = saved.order.clone();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..count) || saved.next > count {
            return Err("the saved order does not contain every image exactly once".to_owned());
        }
        let is_as_many = count == self.order.len();
        if is_as_many {
            *self = saved;
        } else {
            *self = Self {
                random: saved.random,
                ..Self::new(self.order.len(), self.size, 0)
            };
        }
        Ok(is_as_many)
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

    #[test]
    fn an_order_is_taken_up_where_it_was() {
        let mut batches = Batches::new(10, 3, 1);
        (0..4).for_each(|_| drop(batches.advance().to_vec()));
        let text = serde_json::to_string(&batches).unwrap();
        let saved = || serde_json::from_str::<Batches>(&text).unwrap();
        let mut again = Batches::new(10, 3, 2);
        assert_eq!(again.go_on_from(saved()), Ok(true));
        for _ in 0..8 {
            assert_eq!(again.advance(), batches.advance());
        }
        let before = Batches::new(10, 3, 2);
        let spoil: [fn(&mut Batches); 5] = [
            |saved| saved.order[0] = saved.order[1],
            |saved| saved.order[3] = usize::MAX,
            |saved| saved.next = 11,
            |saved| saved.size = 2,
            |saved| saved.order.truncate(2),
        ];
        for spoil in spoil {
            let mut saved = saved();
            spoil(&mut saved);
            let mut again = Batches::new(10, 3, 2);
            again.go_on_from(saved).unwrap_err();
            assert_eq!(again, before);
        }
    }

    #[test]
    fn more_or_fewer_images_begin_a_new_epoch() {
        for count in [7, 14] {
            let orders: Vec<_> = [1, 1, 2]
                .map(|seed| {
                    let mut saved = Batches::new(10, 3, seed);
                    drop(saved.advance().to_vec());
                    let mut again = Batches::new(count, 3, 5);
                    assert_eq!(again.go_on_from(saved), Ok(false));
                    let mut seen: Vec<_> = (0..count / 3)
                        .flat_map(|_| again.advance().to_vec())
                        .collect();
                    let order = seen.clone();
                    seen.sort_unstable();
                    seen.dedup();
                    assert_eq!(seen.len(), count / 3 * 3);
                    assert!(seen.last() < Some(&count));
                    order
                })
                .into();
            assert_eq!(orders[0], orders[1]);
            assert_ne!(orders[0], orders[2]);
        }
    }
}

//! Finds duplicates in linear time.

use std::collections::HashMap;
use std::hash::Hash;

use crate::error::{Error, Result};
use crate::optim::Parameter;

/// Indices of the earlier and the later of the first two equal keys.
pub(crate) fn first_repeated<K: Hash + Eq>(
    keys: impl IntoIterator<Item = K>,
) -> Option<(usize, usize)> {
    let mut places = HashMap::new();
    keys.into_iter()
        .enumerate()
        .find_map(|(place, key)| places.insert(key, place).map(|earlier| (earlier, place)))
}

/// Refuses parameters with the same name, which a saved state could not tell apart.
///
/// # Errors
/// [`Error::InvalidArgument`] for `op` with the name.
pub(crate) fn check_names(op: &'static str, parameters: &[Parameter]) -> Result<()> {
    let Some((first, second)) = first_repeated(parameters.iter().map(Parameter::name)) else {
        return Ok(());
    };
    let name = parameters[second].name();
    let reason = match parameters[first].is_same(&parameters[second]) {
        true => format!("parameter `{name}` is given twice"),
        false => format!("two parameters are named `{name}`"),
    };
    Err(Error::argument(op, reason))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::hash::Hasher;

    use super::*;

    /// A key that counts how often it is compared.
    struct Counting<'a>(u64, &'a Cell<u64>);

    impl Hash for Counting<'_> {
        fn hash<H: Hasher>(&self, state: &mut H) {
            self.0.hash(state);
        }
    }

    impl PartialEq for Counting<'_> {
        fn eq(&self, other: &Self) -> bool {
            self.1.set(self.1.get() + 1);
            self.0 == other.0
        }
    }

    impl Eq for Counting<'_> {}

    #[test]
    fn the_first_repeated_key_is_found() {
        assert_eq!(first_repeated(["a", "b", "c"]), None);
        assert_eq!(first_repeated(["a", "b", "c", "b", "a"]), Some((1, 3)));
        assert_eq!(first_repeated([0u8; 0]), None);
    }

    #[test]
    fn keys_are_compared_no_more_often_than_there_are_keys() {
        let count = Cell::new(0);
        let keys = (0..32_000).map(|key| Counting(key, &count));
        assert_eq!(first_repeated(keys), None);
        // Comparing every pair would take 512 million.
        assert!(count.get() < 32_000, "{}", count.get());
    }
}

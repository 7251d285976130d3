//! Corrupts files for the tests of readers, with byte mutations generated from a seed.
//!
//! Must not know: what the bytes mean.

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

/// A mutation at one position.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Set(u8),
    Insert(u8),
    Remove,
    Truncate,
    /// Duplicates up to this many bytes from the position on.
    Repeat(u8),
}

/// A few changes, each with its position.
pub(crate) fn changes() -> impl Strategy<Value = Vec<(prop::sample::Index, Change)>> {
    let change = prop_oneof![
        8 => any::<u8>().prop_map(Change::Set),
        // The characters of JSON and of lists of numbers.
        8 => prop::sample::select(&b"{}[]\",:0123456789-e. "[..]).prop_map(Change::Set),
        4 => any::<u8>().prop_map(Change::Insert),
        2 => Just(Change::Remove),
        1 => Just(Change::Truncate),
        2 => (1..64_u8).prop_map(Change::Repeat),
    ];
    prop::collection::vec((any::<prop::sample::Index>(), change), 1..6)
}

/// Applies `changes` to `bytes`.
pub(crate) fn changed(mut bytes: Vec<u8>, changes: &[(prop::sample::Index, Change)]) -> Vec<u8> {
    for (index, change) in changes {
        if bytes.is_empty() {
            break;
        }
        let at = index.index(bytes.len());
        match change {
            Change::Set(value) => bytes[at] = *value,
            Change::Insert(value) => bytes.insert(at, *value),
            Change::Remove => drop(bytes.remove(at)),
            Change::Truncate => bytes.truncate(at),
            Change::Repeat(count) => {
                let end = bytes.len().min(at + usize::from(*count));
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
        }
    }
    bytes
}

/// Runs `test` on `cases` values of `strategy`. They depend only on the seed, `KITSUNE_SEED` or 0. A failure reports
/// the seed and the smallest failing value.
pub(crate) fn fuzz<S: Strategy>(
    cases: u32,
    strategy: &S,
    test: impl Fn(S::Value) -> Result<(), TestCaseError>,
) {
    let seed = std::env::var("KITSUNE_SEED").map_or(0, |seed| {
        seed.parse::<u64>().expect("KITSUNE_SEED is a number")
    });
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let outcome = TestRunner::new_with_rng(config, rng).run(strategy, test);
    outcome.unwrap_or_else(|error| panic!("KITSUNE_SEED={seed}: {error}"));
}

//! Files that nobody would write, for the tests of readers: bytes that change, from a seed.
//!
//! Must not know: what the bytes mean.

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

/// A change of bytes: what is written where, or cut off.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Set(u8),
    Insert(u8),
    Remove,
    Truncate,
    /// Repeats a few bytes from there on.
    Repeat(u8),
}

/// A few changes, each with its place.
pub(crate) fn changes() -> impl Strategy<Value = Vec<(prop::sample::Index, Change)>> {
    let change = prop_oneof![
        8 => any::<u8>().prop_map(Change::Set),
        // What JSON and lists of numbers are made of.
        8 => prop::sample::select(&b"{}[]\",:0123456789-e. "[..]).prop_map(Change::Set),
        4 => any::<u8>().prop_map(Change::Insert),
        2 => Just(Change::Remove),
        1 => Just(Change::Truncate),
        2 => (1..64_u8).prop_map(Change::Repeat),
    ];
    prop::collection::vec((any::<prop::sample::Index>(), change), 1..6)
}

/// `bytes` after `changes`.
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

/// Runs `test` on `cases` values of `strategy`, always the same ones, or those of the seed that `KITSUNE_SEED` names;
/// a failure names the seed and the smallest value that fails.
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

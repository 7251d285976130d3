//! What several test binaries share.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a program takes the suites it needs"
)]

/// Seeds to run: the one that `KITSUNE_SEED` names, or `0..count`, of which `KITSUNE_SEEDS` gives the number at most.
pub fn seeds(count: u64) -> std::ops::Range<u64> {
    match variable("KITSUNE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..count.min(seeds_max()),
    }
}

/// Seeds to run out of `all`: the one that `KITSUNE_SEED` names, if it is among them, or all, of which `KITSUNE_SEEDS`
/// gives the number at most.
pub fn seeds_in(all: std::ops::Range<u64>) -> std::ops::Range<u64> {
    match variable("KITSUNE_SEED") {
        Some(seed) => seed.max(all.start)..(seed + 1).min(all.end),
        None => all.start..all.end.min(all.start.saturating_add(seeds_max())),
    }
}

fn seeds_max() -> u64 {
    variable("KITSUNE_SEEDS").unwrap_or(u64::MAX)
}

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    )
}

/// Runs `test` for one seed and names the seed if it panics.
pub fn with_seed(seed: u64, test: impl FnOnce(u64)) {
    struct Report(u64);
    impl Drop for Report {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!(
                    "failed with seed {}; run it alone with KITSUNE_SEED={}",
                    self.0, self.0
                );
            }
        }
    }
    let report = Report(seed);
    test(seed);
    drop(report);
}

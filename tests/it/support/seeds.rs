//! What several test binaries share.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a program takes the suites it needs"
)]

/// Seeds to run: those that `KITSUNE_SEED` names (one number), or `0..count`.
pub fn seeds(count: u64) -> std::ops::Range<u64> {
    match std::env::var("KITSUNE_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("KITSUNE_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..count,
    }
}

/// Seeds to run out of `all`: the one that `KITSUNE_SEED` names, if it is among them, or all.
pub fn seeds_in(all: std::ops::Range<u64>) -> std::ops::Range<u64> {
    let named = seeds(all.end);
    named.start.max(all.start)..named.end.min(all.end)
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

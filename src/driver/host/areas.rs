//! How many separate mappings the process can still make.
//!
//! Linux limits the number of a process's memory areas (`vm.max_map_count`, 65,530 by default). The process's allocator
//! needs areas too: if none is left, the next `malloc` fails and the program with it. So all host devices together
//! leave a share of the areas to the rest of the process, and refuse mappings beyond that.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The limit if it cannot be read: Linux's default.
const DEFAULT_MAX: usize = 65_530;
/// One area in this many is left to the rest of the process.
const LEFT_ALONE: usize = 8;

/// Areas in use by the host devices of this process.
static TAKEN: AtomicUsize = AtomicUsize::new(0);

fn max() -> usize {
    static MAX: OnceLock<usize> = OnceLock::new();
    *MAX.get_or_init(|| {
        let told = std::fs::read_to_string("/proc/sys/vm/max_map_count");
        let max = told
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(DEFAULT_MAX);
        max - max / LEFT_ALONE
    })
}

/// Takes `count` areas; returns false, and takes none, if fewer are left.
pub(super) fn take(count: usize) -> bool {
    // Relaxed: the number guards no memory.
    let taken = TAKEN.fetch_add(count, Ordering::Relaxed) + count;
    if taken > max() {
        give(count);
    }
    taken <= max()
}

/// Takes `count` areas even beyond the limit, for operations that cannot be refused.
pub(super) fn take_anyway(count: usize) {
    TAKEN.fetch_add(count, Ordering::Relaxed);
}

/// Gives `count` areas back.
pub(super) fn give(count: usize) {
    TAKEN.fetch_sub(count, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_left_alone_and_a_refusal_takes_nothing() {
        assert!(!take(max() + 1));
        assert!(take(1));
        give(1);
    }
}

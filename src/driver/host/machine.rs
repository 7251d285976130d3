//! How much of the machine's memory is left to pin.
//!
//! Linux overcommits memory and kills a process when too much is touched. All pinned memory is touched at once, so the
//! bound is checked before: the memory that the kernel reports as available (`MemAvailable`), and what the limits of
//! the process's control groups (version 1 or 2, including all parent groups) leave. A margin of each total stays
//! free, because both figures are estimates and other programs keep allocating. If none of this can be read, nothing
//! is refused here.

use std::fs;
use std::path::{Path, PathBuf};

use super::errno::{ENOMEM, refuse};
use crate::error::Result;
use crate::units::{Bytes, GIB, KIB, MIB};

/// The margin that stays free is the machine's memory, or a group's limit, divided by this, within the bounds below.
const LEFT_ALONE: u64 = 16;
const LEFT_ALONE_MIN: u64 = 64 * MIB;
const LEFT_ALONE_MAX: u64 = 4 * GIB;

/// A bound on memory: how much there is in total, and how much of it is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Source {
    total: u64,
    free: u64,
}

impl Source {
    fn margin(self) -> u64 {
        (self.total / LEFT_ALONE).clamp(LEFT_ALONE_MIN, LEFT_ALONE_MAX)
    }

    fn room(self) -> u64 {
        self.free.saturating_sub(self.margin())
    }
}

/// Refuses to touch `bytes` of memory if the machine has less to spare.
pub(super) fn check(call: &'static str, bytes: u64) -> Result<()> {
    match tightest(Path::new("/")) {
        Some(source) if bytes > source.room() => {
            let [asked, free, total, margin] =
                [bytes, source.free, source.total, source.margin()].map(Bytes);
            let reason = format!(
                "no room for {asked} of host memory: {free} of {total} are free, and {margin} must stay free"
            );
            Err(refuse(call, ENOMEM, reason))
        }
        _ => Ok(()),
    }
}

/// The source with the least room, read from the files under `root`.
fn tightest(root: &Path) -> Option<Source> {
    let mut sources: Vec<Source> = groups(root);
    sources.extend(machine(root));
    sources.into_iter().min_by_key(|source| source.room())
}

/// The figures of the whole machine.
fn machine(root: &Path) -> Option<Source> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let kib = |key| labelled(&text, key)?.checked_mul(KIB);
    Some(Source {
        total: kib("MemTotal:")?,
        free: kib("MemAvailable:")?,
    })
}

/// Names of the files that describe a group.
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// The entry of `memory.stat` for cached file pages that the kernel drops first.
    droppable: &'static str,
}

const VERSION_1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    droppable: "total_inactive_file",
};
const VERSION_2: Files = Files {
    limit: "memory.max",
    usage: "memory.current",
    droppable: "inactive_file",
};

/// The process's groups that have a limit, including parent groups.
fn groups(root: &Path) -> Vec<Source> {
    let Ok(text) = fs::read_to_string(root.join("proc/self/cgroup")) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (base, files) = if controllers.is_empty() {
            (root.join("sys/fs/cgroup"), VERSION_2)
        } else if controllers.split(',').any(|name| name == "memory") {
            (root.join("sys/fs/cgroup/memory"), VERSION_1)
        } else {
            continue;
        };
        // Inside a container this may be the path outside it, of which only the root is visible.
        let path = PathBuf::from(path.trim_start_matches('/'));
        let above = path.ancestors().map(|group| base.join(group));
        found.extend(above.filter_map(|group| limited(&group, &files)));
    }
    found
}

/// The bound of one group, if it has a limit.
fn limited(group: &Path, files: &Files) -> Option<Source> {
    let read = |name| fs::read_to_string(group.join(name)).ok();
    // Without a limit the file says `max`, which does not parse, or a number larger than any machine's memory.
    let total: u64 = read(files.limit)?.trim().parse().ok()?;
    let usage: u64 = read(files.usage)?.trim().parse().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let used = usage.saturating_sub(labelled(&stat, files.droppable).unwrap_or(0));
    Some(Source {
        total,
        free: total.saturating_sub(used),
    })
}

/// The number after `key`, which starts a line.
fn labelled(text: &str, key: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    lines.find_map(|mut words| {
        let is_it = words.next() == Some(key);
        words.next().filter(|_| is_it)?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       16777216 kB\nMemFree:         1000000 kB\n\
                           MemAvailable:    8388608 kB\n";

    /// A folder with these files, gone with the value.
    struct Root(PathBuf);

    impl Root {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let name = format!("kitsune-machine-{}-{name}", std::process::id());
            let root = Self(std::env::temp_dir().join(name));
            for (path, text) in files {
                let path = root.0.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            root
        }

        fn tightest(&self) -> Option<(u64, u64, u64)> {
            tightest(&self.0).map(|source| (source.total, source.free, source.room()))
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_machine_bounds_where_no_group_does() {
        let root = Root::new("plain", &[("proc/meminfo", MEMINFO)]);
        assert_eq!(root.tightest(), Some((16 * GIB, 8 * GIB, 7 * GIB)));
        let unlimited = Root::new(
            "unlimited",
            &[
                ("proc/meminfo", MEMINFO),
                ("proc/self/cgroup", "0::/user/shell\n1:memory:/user\n"),
                ("sys/fs/cgroup/user/shell/memory.max", "max\n"),
                ("sys/fs/cgroup/user/shell/memory.current", "4096\n"),
                (
                    "sys/fs/cgroup/memory/user/memory.limit_in_bytes",
                    "9223372036854771712\n",
                ),
                ("sys/fs/cgroup/memory/user/memory.usage_in_bytes", "4096\n"),
            ],
        );
        assert_eq!(unlimited.tightest(), root.tightest());
        assert_eq!(Root::new("none", &[]).tightest(), None);
    }

    #[test]
    fn a_group_above_bounds_too_and_what_it_can_drop_is_free() {
        let root = Root::new(
            "second",
            &[
                ("proc/meminfo", MEMINFO),
                ("proc/self/cgroup", "0::/pod/box\n"),
                ("sys/fs/cgroup/pod/memory.max", "1073741824\n"),
                ("sys/fs/cgroup/pod/memory.current", "805306368\n"),
                (
                    "sys/fs/cgroup/pod/memory.stat",
                    "anon 536870912\ninactive_file 268435456\nactive_file 1\n",
                ),
                ("sys/fs/cgroup/pod/box/memory.max", "max\n"),
                ("sys/fs/cgroup/pod/box/memory.current", "805306368\n"),
            ],
        );
        assert_eq!(root.tightest(), Some((GIB, GIB / 2, GIB / 2 - 64 * MIB)));
    }

    #[test]
    fn groups_of_the_first_version_are_found_at_the_top_of_a_container() {
        let root = Root::new(
            "first",
            &[
                ("proc/meminfo", MEMINFO),
                (
                    "proc/self/cgroup",
                    "12:cpu,cpuacct:/x\n7:memory:/docker/0123\n0::/\n",
                ),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "4294967296\n"),
                ("sys/fs/cgroup/memory/memory.usage_in_bytes", "3221225472\n"),
                (
                    "sys/fs/cgroup/memory/memory.stat",
                    "inactive_file 7\ntotal_inactive_file 1073741824\n",
                ),
            ],
        );
        assert_eq!(root.tightest(), Some((4 * GIB, 2 * GIB, 2 * GIB - GIB / 4)));
    }

    #[test]
    fn a_machine_with_nothing_left_has_no_room() {
        let meminfo = "MemTotal: 1048576 kB\nMemAvailable: 60000 kB\n";
        let root = Root::new("full", &[("proc/meminfo", meminfo)]);
        assert_eq!(root.tightest(), Some((GIB, 60_000 * KIB, 0)));
    }
}

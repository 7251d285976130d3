//! Attribution of memory to components.
//!
//! A *tag* names a component (`amp`, `activations`). While a [`TagScope`] lives, blocks allocated by its
//! thread count under its tag until they are freed, wherever that happens.
//!
//! Names may be made at run time. Each is kept once, for as long as the process runs, and how many there are is
//! bounded: what comes later counts together as [`OTHER`].

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::LazyLock;

use super::gauge::{Gauge, Stat};
use crate::memory::thread_locals::LOCAL;
use crate::memory::types::TagId;
use parking_lot::RwLock;

/// Of blocks allocated outside any scope.
const UNTAGGED: &str = "untagged";
/// Of blocks allocated under a name that came when there were too many.
const OTHER: &str = "other";
/// Names that are kept beside [`UNTAGGED`] and [`OTHER`], and their bytes in all.
const NAMES_MAX: usize = 4096;
const NAME_BYTES_MAX: usize = 16 << 20;

/// Names of all tags used so far.
static NAMES: LazyLock<RwLock<Names>> = LazyLock::new(RwLock::default);

struct Names {
    /// By number.
    names: Vec<&'static str>,
    numbers: HashMap<&'static str, TagId>,
    /// Bytes of all names.
    bytes: usize,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            names: vec![UNTAGGED, OTHER],
            // Without a name, nothing is named.
            numbers: HashMap::from([
                (UNTAGGED, TagId::NONE),
                ("", TagId::NONE),
                (OTHER, TagId::OTHER),
            ]),
            bytes: 0,
        }
    }
}

impl Names {
    /// The number of `name`, which is kept if there is room.
    fn number(&mut self, name: &str) -> TagId {
        // Another thread may have come first.
        if let Some(known) = self.numbers.get(name) {
            return *known;
        }
        let bytes = self.bytes.saturating_add(name.len());
        let kept = self.names.len() - 2;
        let number = u16::try_from(self.names.len()).ok();
        let Some(number) = number.filter(|_| kept < NAMES_MAX && bytes <= NAME_BYTES_MAX) else {
            return TagId::OTHER;
        };
        let name: &'static str = Box::leak(name.into());
        self.bytes = bytes;
        self.names.push(name);
        self.numbers.insert(name, TagId(number));
        TagId(number)
    }
}

impl TagId {
    /// The tag of the calling thread's innermost scope.
    #[inline]
    pub(crate) fn current() -> Self {
        LOCAL.with(|local| local.tag.get())
    }

    fn named(name: &str) -> Self {
        let known = NAMES.read().numbers.get(name).copied();
        known.unwrap_or_else(|| NAMES.write().number(name))
    }

    pub(crate) fn name(self) -> &'static str {
        NAMES
            .read()
            .names
            .get(usize::from(self.0))
            .copied()
            .unwrap_or(UNTAGGED)
    }
}

/// Counts what this thread allocates under a tag, until dropped. Made by [`tag`].
#[must_use = "the tag holds only while the scope lives"]
#[derive(Debug)]
pub struct TagScope {
    outer: TagId,
    /// The scope belongs to the thread that made it.
    not_send: PhantomData<*const ()>,
}

/// Counts blocks that the calling thread allocates from now on under `name`, until the scope is dropped.
/// Scopes nest; the innermost counts.
///
/// A name may be made at run time. The process keeps each one once and never frees it: the first 4,096, as long as
/// they have at most 16 MiB in all. Blocks under any later name count together as `other`. Under an empty name they
/// count as `untagged`.
///
/// ```
/// use kitsune::memory::tag;
/// # use kitsune::{Device, HostConfig, Pool, PoolConfig};
/// # let device = Device::host(HostConfig::default())?;
/// # let pool = Pool::new(&device, PoolConfig::default())?;
/// # let stream = device.create_stream()?;
/// let blocks: Vec<_> = (0..3)
///     .map(|layer| {
///         let _scope = tag(format!("layer.{layer}"));
///         pool.allocate(1024, &stream)
///     })
///     .collect();
/// assert_eq!(pool.tag_stats()[2].tag, "layer.2");
/// # drop(blocks);
/// # Ok::<(), kitsune::Error>(())
/// ```
pub fn tag(name: impl AsRef<str>) -> TagScope {
    let outer = LOCAL.with(|local| local.tag.replace(TagId::named(name.as_ref())));
    TagScope {
        outer,
        not_send: PhantomData,
    }
}

impl Drop for TagScope {
    fn drop(&mut self) {
        LOCAL.with(|local| local.tag.set(self.outer));
    }
}

/// Allocated bytes of one component.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TagStat {
    /// The component's name; `untagged` for blocks allocated outside any scope, `other` for those under a name that
    /// came after the first 4,096.
    pub tag: &'static str,
    /// Allocated (rounded) bytes.
    pub allocated_bytes: Stat,
}

/// Bytes by tag, of a pool or of a part of it.
#[derive(Debug, Default)]
pub(crate) struct TagTable {
    gauges: Vec<Gauge>,
}

impl TagTable {
    #[inline]
    pub(crate) fn increase(&mut self, tag: TagId, bytes: u64) {
        self.gauge(usize::from(tag.0)).increase(bytes);
    }

    #[inline]
    pub(crate) fn decrease(&mut self, tag: TagId, bytes: u64) {
        self.gauge(usize::from(tag.0)).decrease(bytes);
    }

    #[inline]
    fn gauge(&mut self, index: usize) -> &mut Gauge {
        if index >= self.gauges.len() {
            self.grow(index);
        }
        &mut self.gauges[index]
    }

    #[cold]
    #[inline(never)]
    fn grow(&mut self, index: usize) {
        self.gauges.resize(index + 1, Gauge::default());
    }

    /// Takes over what `part` has counted for one tag.
    pub(super) fn fold_one(&mut self, tag: TagId, part: &Gauge) {
        self.gauge(usize::from(tag.0)).fold(part);
    }

    /// Takes over what `part` has counted since it was folded last.
    pub(crate) fn fold(&mut self, part: &mut Self) {
        for (index, gauge) in part.gauges.iter_mut().enumerate() {
            self.gauge(index).fold(&std::mem::take(gauge));
        }
    }

    pub(crate) fn reset_peaks(&mut self) {
        self.gauges.iter_mut().for_each(Gauge::reset_peak);
    }

    /// Every tag that was ever used in this pool, `untagged` and `other` first, then in order of first use in the
    /// process.
    pub(crate) fn snapshot(&self) -> Vec<TagStat> {
        let stats = (0..=u16::MAX).zip(self.gauges.iter().map(Gauge::stat));
        stats
            .filter(|(_, stat)| stat.allocated > 0)
            .map(|(index, stat)| TagStat {
                tag: TagId(index).name(),
                allocated_bytes: stat,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_kept_once_and_4096_of_them() {
        let mut names = Names::default();
        let mut numbers: Vec<TagId> = (0..NAMES_MAX)
            .map(|layer| names.number(&format!("layer.{layer}")))
            .collect();
        assert_eq!(names.names[usize::from(numbers[7].0)], "layer.7");
        assert_eq!(names.number("layer.7"), numbers[7], "the same once more");
        assert_eq!(numbers[NAMES_MAX - 1], TagId(4097), "the last has its own");
        assert_eq!(names.number("layer.4096"), TagId::OTHER);
        assert_eq!(names.number("layer.4097"), TagId::OTHER);
        assert_eq!(names.number("layer.0"), numbers[0], "those before stay");
        assert_eq!(
            names.names.len(),
            NAMES_MAX + 2,
            "nothing is kept of others"
        );
        numbers.sort_by_key(|number| number.0);
        numbers.dedup();
        assert_eq!(numbers.len(), NAMES_MAX);
    }

    #[test]
    fn names_that_mean_something_take_no_room() {
        let mut names = Names::default();
        for (name, number) in [
            ("", TagId::NONE),
            (UNTAGGED, TagId::NONE),
            (OTHER, TagId::OTHER),
        ] {
            assert_eq!(names.number(name), number, "`{name}`");
        }
        assert_eq!((names.names.len(), names.bytes), (2, 0));
    }

    #[test]
    fn long_names_are_kept_as_they_are_while_there_is_room_for_their_bytes() {
        let mut names = Names::default();
        let long = "ä".repeat(NAME_BYTES_MAX / 2 - 1);
        let number = names.number(&long);
        assert_eq!(names.names[usize::from(number.0)], long);
        assert_eq!(names.number("abc"), TagId::OTHER, "a byte too many");
        assert_eq!(names.number("ab"), TagId(3), "just fits");
        assert_eq!(names.number("a"), TagId::OTHER);
        assert_eq!(names.number(&long), number);
    }
}

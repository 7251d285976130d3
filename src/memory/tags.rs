//! Attribution of memory to components.
//!
//! A *tag* names a component (`amp`, `activations`). While a [`TagScope`] lives, blocks allocated by its
//! thread count under its tag until they are freed, wherever that happens.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::LazyLock;

use parking_lot::RwLock;

use super::local::LOCAL;
use super::stats::{Gauge, Stat};

/// Number of a tag, the same in every pool of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TagId(u16);

/// Names of all tags used so far.
static NAMES: LazyLock<RwLock<Names>> = LazyLock::new(RwLock::default);

struct Names {
    /// By number; 0 is "untagged".
    names: Vec<&'static str>,
    numbers: HashMap<&'static str, usize>,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            names: vec![TagId::UNTAGGED],
            numbers: HashMap::from([(TagId::UNTAGGED, 0)]),
        }
    }
}

impl Names {
    fn number(&mut self, name: &'static str) -> usize {
        let Self { names, numbers } = self;
        *numbers.entry(name).or_insert_with(|| {
            names.push(name);
            names.len() - 1
        })
    }
}

impl TagId {
    const UNTAGGED: &'static str = "untagged";

    /// Of blocks allocated outside any scope.
    pub(super) const NONE: Self = Self(0);

    /// The tag of the calling thread's innermost scope.
    #[inline]
    pub(super) fn current() -> Self {
        LOCAL.with(|local| local.tag.get())
    }

    fn named(name: &'static str) -> Self {
        let known = NAMES.read().numbers.get(name).copied();
        let index = known.unwrap_or_else(|| NAMES.write().number(name));
        Self(u16::try_from(index).unwrap_or(0))
    }

    pub(super) fn name(self) -> &'static str {
        NAMES
            .read()
            .names
            .get(usize::from(self.0))
            .copied()
            .unwrap_or(Self::UNTAGGED)
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
/// Scopes nest; the innermost counts. A process may have 65,535 names: under more, blocks count as `untagged`.
pub fn tag(name: &'static str) -> TagScope {
    let outer = LOCAL.with(|local| local.tag.replace(TagId::named(name)));
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
    /// The component's name; `untagged` for blocks allocated outside any scope.
    pub tag: &'static str,
    /// Allocated (rounded) bytes.
    pub allocated_bytes: Stat,
}

/// Bytes by tag, of a pool or of a part of it.
#[derive(Debug, Default)]
pub(super) struct TagTable {
    gauges: Vec<Gauge>,
}

impl TagTable {
    #[inline]
    pub(super) fn increase(&mut self, tag: TagId, bytes: u64) {
        self.gauge(usize::from(tag.0)).increase(bytes);
    }

    #[inline]
    pub(super) fn decrease(&mut self, tag: TagId, bytes: u64) {
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
    pub(super) fn fold(&mut self, part: &mut Self) {
        for (index, gauge) in part.gauges.iter_mut().enumerate() {
            self.gauge(index).fold(&std::mem::take(gauge));
        }
    }

    pub(super) fn reset_peaks(&mut self) {
        self.gauges.iter_mut().for_each(Gauge::reset_peak);
    }

    /// Every tag that was ever used in this pool, in order of first use in the process.
    pub(super) fn snapshot(&self) -> Vec<TagStat> {
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

//! Peaks of a part of a program.
//!
//! The pool keeps one running peak for each quantity. While scopes are open it covers only the time since
//! they were last *settled*: settling raises the peak of every open scope, and the pool's own, to the running
//! one, and starts that anew at the present value. So allocating costs the same with a hundred scopes as
//! with none, and an outer scope has seen all that an inner one has.

use std::collections::BTreeMap;

use super::Pool;
use super::stats::{Gauge, Usage};

/// One quantity since a scope began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ScopedStat {
    /// Value now less the value at the start: negative if more was freed than allocated.
    pub current: i64,
    /// Highest value less the value at the start; not below 0.
    pub peak: i64,
    /// Sum of all increases.
    pub total: u64,
}

/// What a pool's callers held since a scope began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct ScopeStats {
    /// Blocks in callers' hands.
    pub blocks: ScopedStat,
    /// Bytes that callers asked for.
    pub requested_bytes: ScopedStat,
    /// Bytes in callers' hands, rounded to the granularity.
    pub allocated_bytes: ScopedStat,
}

/// Counts what a pool hands out while it lives. Made by [`Pool::peak_scope`].
#[must_use = "the scope ends when it is dropped"]
#[derive(Debug)]
pub struct PeakScope {
    pool: Pool,
    key: u64,
}

impl Pool {
    /// Begins to count peaks relative to now, until the scope is dropped. Scopes may overlap in any way and
    /// end in any order: each counts for itself, so that an outer scope includes the peaks of inner ones.
    ///
    /// A scope counts all threads of the pool. Its figures are exact while one thread uses the pool, or
    /// threads take turns with scopes read in between. With several at once, `current` and `total` are
    /// exact as of some moment during the call, but a peak is joined from the peaks of the threads' caches
    /// and may be off, either way, by what other threads allocated and freed through theirs since the
    /// statistics of the pool were last looked at.
    ///
    /// # Examples
    /// ```
    /// use kitsune::{Device, HostConfig, Pool, PoolConfig};
    ///
    /// let device = Device::host(HostConfig::default())?;
    /// let pool = Pool::new(&device, PoolConfig::default())?;
    /// let stream = device.create_stream()?;
    /// let model = pool.allocate(1 << 20, &stream)?;
    /// let scope = pool.peak_scope();
    /// drop(pool.allocate(4096, &stream)?);
    /// drop(model);
    /// let stats = scope.stats();
    /// assert_eq!(stats.allocated_bytes.peak, 4096);
    /// assert_eq!(stats.allocated_bytes.current, -(1 << 20));
    /// # Ok::<(), kitsune::Error>(())
    /// ```
    pub fn peak_scope(&self) -> PeakScope {
        let mut state = self.shared().lock_and_fold();
        let state = &mut *state;
        PeakScope {
            pool: self.clone(),
            key: state.peaks.open(&mut state.usage),
        }
    }
}

impl PeakScope {
    /// The figures so far.
    #[must_use]
    pub fn stats(&self) -> ScopeStats {
        let mut state = self.pool.shared().lock_and_fold();
        let state = &mut *state;
        state.peaks.stats(self.key, &mut state.usage)
    }
}

impl Drop for PeakScope {
    fn drop(&mut self) {
        let mut state = self.pool.shared().lock_and_fold();
        let state = &mut *state;
        state.peaks.close(self.key, &mut state.usage);
    }
}

/// Blocks, requested and allocated bytes.
const QUANTITIES: usize = 3;

fn gauges(usage: &mut Usage) -> [&mut Gauge; QUANTITIES] {
    [
        &mut usage.blocks,
        &mut usage.requested,
        &mut usage.allocated,
    ]
}

/// The open scopes of a pool.
#[derive(Debug, Default)]
pub(super) struct Peaks {
    next: u64,
    /// By key: where each quantity stood at the start, and its peak up to the last settling.
    open: BTreeMap<u64, [Scope; QUANTITIES]>,
    /// The pool's own peaks up to the last settling, while a scope is open.
    overall: [i64; QUANTITIES],
}

#[derive(Clone, Copy, Debug, Default)]
struct Scope {
    start: i64,
    start_total: u64,
    peak: i64,
}

impl Peaks {
    fn open(&mut self, usage: &mut Usage) -> u64 {
        if self.open.is_empty() {
            self.overall = gauges(usage).map(|gauge| gauge.take_peak());
        } else {
            self.settle(usage);
        }
        let begin = |gauge: &mut Gauge| Scope {
            start: gauge.current(),
            start_total: gauge.increases(),
            peak: gauge.current(),
        };
        let key = self.next;
        self.next += 1;
        self.open.insert(key, gauges(usage).map(begin));
        key
    }

    /// Makes the running peaks those of everything that is counted, and starts them anew.
    fn settle(&mut self, usage: &mut Usage) {
        let running = gauges(usage).map(|gauge| gauge.take_peak());
        let raise = |peak: &mut i64, running: i64| *peak = (*peak).max(running);
        for (index, running) in running.into_iter().enumerate() {
            raise(&mut self.overall[index], running);
            for scope in self.open.values_mut() {
                raise(&mut scope[index].peak, running);
            }
        }
    }

    fn stats(&mut self, key: u64, usage: &mut Usage) -> ScopeStats {
        self.settle(usage);
        let scope = &self.open[&key];
        let stat = |scope: Scope, gauge: &Gauge| ScopedStat {
            current: gauge.current() - scope.start,
            peak: scope.peak - scope.start,
            total: gauge.increases() - scope.start_total,
        };
        ScopeStats {
            blocks: stat(scope[0], &usage.blocks),
            requested_bytes: stat(scope[1], &usage.requested),
            allocated_bytes: stat(scope[2], &usage.allocated),
        }
    }

    fn close(&mut self, key: u64, usage: &mut Usage) {
        self.settle(usage);
        self.open.remove(&key);
        if self.open.is_empty() {
            self.complete(usage);
            self.overall = [0; QUANTITIES];
        }
    }

    /// Gives `usage` the pool's own peaks.
    fn complete(&self, usage: &mut Usage) {
        for (gauge, peak) in gauges(usage).into_iter().zip(self.overall) {
            gauge.raise_peak(peak);
        }
    }

    /// `usage` with the pool's own peaks, whatever scopes are open.
    pub(super) fn completed(&self, usage: &Usage) -> Usage {
        let mut usage = *usage;
        if !self.open.is_empty() {
            self.complete(&mut usage);
        }
        usage
    }

    /// To be called before the running peaks are reset: the pool's own then start anew, those of scopes
    /// stay.
    pub(super) fn reset_overall(&mut self, usage: &mut Usage) {
        if !self.open.is_empty() {
            self.settle(usage);
            self.overall = gauges(usage).map(|gauge| gauge.current());
        }
    }
}

//! How much memory has been idle for long enough to go back to the driver.
//!
//! Pages are interchangeable, since any of them can be stitched. So amounts age, not pages: what was not needed at the
//! peak of a whole period has been idle for that period, wherever it lies. A period ends at the first slow call after
//! its time; no thread watches the clock.
//!
//! Must not know: pages, the pool's lock.

use std::time::{Duration, Instant};

/// Held back beyond the peak of a period, as one part in this many of it: what lies idle in partly used pages
/// would otherwise be returned and taken again in every period.
const SLACK: u64 = 8;

#[derive(Debug)]
pub(crate) struct Decay {
    /// How long memory may be idle; `None` for ever.
    period: Option<Duration>,
    begun: Instant,
    /// Bytes in blocks, and the most there were in this period.
    in_use: u64,
    peak: u64,
}

impl Decay {
    pub(crate) fn new(period: Option<Duration>, now: Instant) -> Self {
        Self {
            period,
            begun: now,
            in_use: 0,
            peak: 0,
        }
    }

    #[inline]
    pub(crate) fn take(&mut self, bytes: u64) {
        self.in_use += bytes;
        self.peak = self.peak.max(self.in_use);
    }

    #[inline]
    pub(crate) fn give(&mut self, bytes: u64) {
        self.in_use -= bytes;
    }

    /// Whether there is a clock to look at.
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.period.is_some()
    }

    /// Whether the period is over at `now`.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        let age = now.saturating_duration_since(self.begun);
        self.period.is_some_and(|period| age >= period)
    }

    /// Ends the period at `now`; how many bytes should be held on to.
    pub(crate) fn end_period(&mut self, now: Instant) -> u64 {
        let keep = self.peak.saturating_add(self.peak / SLACK);
        self.begun = now;
        self.peak = self.in_use;
        keep
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_keeps_its_peak_and_the_next_one_what_was_in_use_since() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut decay = Decay::new(Some(Duration::from_secs(10)), start);
        decay.take(800);
        decay.give(600);
        assert!(!decay.is_due(after(9)) && decay.is_due(after(10)));
        assert_eq!(decay.end_period(after(10)), 900);
        assert!(!decay.is_due(after(19)) && decay.is_due(after(20)));
        decay.take(200);
        assert_eq!(decay.end_period(after(20)), 450);
        decay.give(400);
        assert_eq!(decay.end_period(after(30)), 450);
        assert_eq!(decay.end_period(after(40)), 0);
    }

    #[test]
    fn without_a_period_nothing_is_due() {
        let start = Instant::now();
        let decay = Decay::new(None, start);
        assert!(!decay.is_on() && !decay.is_due(start + Duration::from_secs(1 << 30)));
        let always = Decay::new(Some(Duration::ZERO), start);
        assert!(always.is_due(start));
    }
}

//! The progress display on standard error: a bar and a line of numbers.

use std::fmt;

use indicatif::{ProgressBar, ProgressStyle};

/// Steps between two updates of the numbers: reading them takes longer than a step of a small network.
const STEPS_PER_UPDATE: u64 = 10;

/// A bar over the steps of a run. If standard error is not a terminal, it shows nothing and costs nothing.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
}

/// The current numbers of a run. Counts are since its start.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Standing {
    pub(crate) loss: f32,
    /// Share of the last batch that was predicted correctly.
    pub(crate) accuracy: f64,
    pub(crate) scale: f64,
    pub(crate) overflow_steps: u64,
    /// Share of allocations served from the pool's cache.
    pub(crate) pool_hits: f64,
    pub(crate) driver_allocs: u64,
}

impl Progress {
    /// A bar that is full after `steps`.
    pub(crate) fn new(steps: u64) -> Self {
        let bar = ProgressBar::new(steps);
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len}\n{wide_msg}")
            .expect("the template is well formed");
        bar.set_style(style);
        Self { bar }
    }

    /// Moves the bar to `step`. Calls `standing` only if its numbers will be shown.
    pub(crate) fn advance<E>(
        &self,
        step: u64,
        standing: impl FnOnce() -> Result<Standing, E>,
    ) -> Result<(), E> {
        if self.bar.is_hidden() || !step.is_multiple_of(STEPS_PER_UPDATE) {
            return Ok(());
        }
        self.bar.set_position(step);
        self.bar.set_message(standing()?.to_string());
        Ok(())
    }
}

impl Drop for Progress {
    /// Clears the bar, so that the result or the error starts on a clean line.
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            // Fits in 80 columns.
            "loss {:.4}  accuracy {:.0} %  scale {}  overflows {}  pool hits {:.1} %  driver {}",
            self.loss,
            self.accuracy * 100.0,
            self.scale,
            self.overflow_steps,
            self.pool_hits * 100.0,
            self.driver_allocs
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_nobody_sees_are_not_asked_for() {
        let progress = Progress {
            bar: ProgressBar::hidden(),
        };
        let outcome: Result<(), ()> = progress.advance(STEPS_PER_UPDATE, || Err(()));
        assert_eq!(outcome, Ok(()));
    }
}

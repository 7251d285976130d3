//! Finds the smallest device on which all allocations of the programs succeed.
//!
//! This is the fairest measure of fragmentation, because it does not penalize a pool for taking memory early. Success
//! need not be monotonic in the device size, so the search, which starts from above, may find one of several
//! boundaries.

use indicatif::ProgressBar;
use kitsune::units::KIB;

use super::figures::Figures;
use super::measure::{Halt, Setup, passes};
use super::program::Program;

/// The result is accurate to the peak of the requested bytes divided by this.
const TOLERANCE_SHARE: u64 = 400;
/// The granularity of the device's memory.
const GRANULE: u64 = 4 * KIB;

/// Bisects between the bytes requested and a size that passes. `None` if even the configured device size is too small.
pub(crate) fn find(
    setup: &Setup,
    programs: &[Program],
    figures: &Figures,
    bar: &ProgressBar,
) -> Result<Option<u64>, Halt> {
    let requested = figures.peak_requested_bytes;
    if figures.ooms > 0 {
        return Ok(None);
    }
    if requested == 0 {
        return Ok(Some(0));
    }
    // The peak of the requested bytes is a lower bound.
    let mut too_small = requested.max(GRANULE) - 1;
    let tolerance = (requested / TOLERANCE_SHARE).max(GRANULE);
    let mut enough = figures.peak_reserved_bytes.min(setup.host_bytes());
    // On a smaller device a pool may place blocks differently and need more than it held before.
    while !passes(setup, enough, programs)? {
        bar.inc(1);
        if enough == setup.host_bytes() {
            return Ok(None);
        }
        too_small = enough;
        enough = enough
            .saturating_add(enough / 16 + tolerance)
            .min(setup.host_bytes());
    }
    while enough - too_small > tolerance {
        bar.inc(1);
        let middle = too_small + (enough - too_small) / 2;
        if passes(setup, middle, programs)? {
            enough = middle;
        } else {
            too_small = middle;
        }
    }
    Ok(Some(enough))
}

//! The smallest device on which programs find room for everything.
//!
//! The fairest figure for fragmentation: it does not punish a pool for taking memory early. What passes
//! need not be monotonic in the size, so this is one boundary, from above, of perhaps several.

use indicatif::ProgressBar;
use kitsune::units::KIB;

use super::figures::Figures;
use super::measure::{Halt, Setup, passes};
use super::program::Program;

/// The figure is right to this share of the peak of requested bytes.
const TOLERANCE_SHARE: u64 = 400;
/// The device counts its memory in these.
const GRANULE: u64 = 4 * KIB;

/// Bisects between what the programs request and what passes; `None` if not even the whole device does.
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
    // What is requested at once is the least that can pass.
    let mut too_small = requested.max(GRANULE) - 1;
    let tolerance = (requested / TOLERANCE_SHARE).max(GRANULE);
    let mut enough = figures.peak_reserved_bytes.min(setup.host_bytes());
    // With less to spare a pool may go other ways and need more than it held before.
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

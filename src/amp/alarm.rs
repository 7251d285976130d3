//! Decides when skipped steps raise an alarm.

use crate::amp::{AmpConfig, NanPolicy, ScalingMode};
use crate::error::{AlarmKind, ScalerAlarm};
use crate::launch::journal::{
    FLOOR_HITS, LAST_GOOD, NAN_IN_A_ROW, RECENT_SKIPS, RECENT_STEPS, SKIPPED_IN_A_ROW, STEPS,
    counter,
};

/// The alarm that `journal` calls for under `config`; the most severe one if there are several.
pub(super) fn alarm(journal: &[f64], config: &AmpConfig, scale: f64) -> Option<ScalerAlarm> {
    let count = |which| counter(journal, which) as u64;
    let in_a_row = count(NAN_IN_A_ROW);
    let skipped = count(RECENT_SKIPS).count_ones();
    let has_floor = config.floor_alarm && config.effective_mode() == ScalingMode::Scale;
    let kind = match config.nan_policy {
        NanPolicy::ErrorAfter(steps) if in_a_row >= u64::from(steps) => AlarmKind::NaN { in_a_row },
        _ if has_floor && journal[FLOOR_HITS] > 0.0 => AlarmKind::AtFloor,
        _ if config.storm_skips > 0 && skipped >= config.storm_skips => AlarmKind::SkipStorm {
            skipped,
            of: RECENT_STEPS,
        },
        _ => return None,
    };
    Some(ScalerAlarm {
        kind,
        scale,
        last_good_scale: last_good(journal),
        steps: count(STEPS),
        skipped_in_a_row: count(SKIPPED_IN_A_ROW),
    })
}

/// The scale of the last applied step.
pub(super) fn last_good(journal: &[f64]) -> Option<f64> {
    Some(journal[LAST_GOOD]).filter(|scale| *scale > 0.0)
}

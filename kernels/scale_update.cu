// The loss scale's next value.
//
//   any flag != 0   k = k + 1, t = 0, and if k >= hysteresis: S = max(float(S * backoff), floor)
//   else            t = t + 1, and if t >= interval: S = min(float(S * growth), cap) if finite, t = 0
//                   k = 0, at once or when the scale grows
//
// Also refreshes 1/S, clears the flags, and notes what it did in the journal. Launch: one thread of one
// block does all. Same bits as the twin, src/launch/scale_update.rs, which has the reasons.
#include "journal.cuh"

struct ScaleUpdateArguments {
    u64 scale;
    u64 inv_scale;
    u64 trackers;
    u64 flags;
    u64 flag_count;
    u64 journal;
    double growth_factor;
    double backoff_factor;
    u32 growth_interval;
    float min_scale;
    float max_scale;
    u32 hysteresis;
    u32 refill_on_growth;
    u32 late_growth;
    u32 ignore_nan;
    u32 is_forced;
    float forced;
};

struct ScaleState {
    float scale;
    u32 tracker;
    u32 overflows;
};

__device__ inline u32 saturating_next(u32 count) { return count == 0xffffffffu ? count : count + 1; }

__device__ inline ScaleState next_scale(const ScaleUpdateArguments& g, ScaleState state, bool overflow) {
    double scale = double(state.scale);
    if (overflow) {
        u32 overflows = saturating_next(state.overflows);
        if (overflows < g.hysteresis) return {state.scale, 0, overflows};
        float less = fmaxf(float(scale * g.backoff_factor), g.min_scale);
        // A scale that was below the floor already must not rise because of an overflow.
        return {fminf(less, state.scale), 0, overflows};
    }
    u32 tracker = saturating_next(state.tracker);
    if (tracker - g.late_growth < g.growth_interval) {
        return {state.scale, tracker, g.refill_on_growth ? state.overflows : 0};
    }
    float grown = float(scale * g.growth_factor);
    if (!is_finite(grown)) return {state.scale, g.late_growth, 0};
    return {fminf(grown, fmaxf(g.max_scale, state.scale)), g.late_growth, 0};
}

__device__ inline void note(const ScaleUpdateArguments& g, bool overflow, ScaleState before, ScaleState after) {
    double* journal = pointer<double>(g.journal);
    journal[UPDATES] += 1.0;
    journal[NAN_STEPS_SINCE_UPDATE] = 0.0;
    journal[INF_STEPS_SINCE_UPDATE] = 0.0;
    if (g.is_forced) {
        // Whoever sets a scale may have to find a fitting one again.
        journal[CALIBRATED] = 0.0;
        journal[RECENT_SKIPS] = 0.0;
        journal[FLOOR_HITS] = 0.0;
    } else {
        if (overflow) journal[BACKOFFS] += 1.0;
        if (after.scale > before.scale) journal[GROWTHS] += 1.0;
        bool at_floor = overflow && before.scale <= g.min_scale && after.overflows >= g.hysteresis;
        journal[FLOOR_HITS] = at_floor ? journal[FLOOR_HITS] + 1.0 : 0.0;
    }
    if (bits_of(after.scale) != bits_of(before.scale)) {
        double* change = journal + CHANGES_START + u64(journal[CHANGES]) % SCALE_CHANGES * CHANGE_WORDS;
        change[0] = journal[UPDATES];
        change[1] = double(after.scale);
        journal[CHANGES] += 1.0;
    }
}

ENTRY(scale_update, ScaleUpdateArguments) {
    if (thread_of_grid() > 0) return;
    float* scale = pointer<float>(arguments.scale);
    u32* trackers = pointer<u32>(arguments.trackers);
    float* flags = pointer<float>(arguments.flags);
    const double* journal = pointer<const double>(arguments.journal);

    bool overflow = false;
    for (u64 index = 0; index < arguments.flag_count; index++) {
        // NaN is not equal to 0 either.
        overflow = overflow || flags[index] != 0.0f;
        flags[index] = 0.0f;
    }
    ScaleState before = {*scale, trackers[0], trackers[1]};
    ScaleState after = before;
    bool only_nan = journal[NAN_STEPS_SINCE_UPDATE] > 0.0 && journal[INF_STEPS_SINCE_UPDATE] == 0.0;
    if (arguments.is_forced) {
        after.scale = arguments.forced;
    } else if (overflow && arguments.ignore_nan && only_nan) {
        overflow = false;
    } else {
        after = next_scale(arguments, before, overflow);
    }
    *scale = after.scale;
    *pointer<float>(arguments.inv_scale) = float(1.0 / double(after.scale));
    trackers[0] = after.tracker;
    trackers[1] = after.overflows;
    note(arguments, overflow, before, after);
}

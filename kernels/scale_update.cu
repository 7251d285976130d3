// The loss scale's next value.
//
//   any flag != 0   S = max(float(S * backoff), floor), t = 0
//   else            t = t + 1, and if t >= interval: S = min(float(S * growth), cap) if finite, t = 0
//
// Also refreshes 1/S, clears the flags, and notes what it did in the journal. Launch: one thread of one
// block does all. Same bits as the twin, src/launch/scale_update.rs, which has the reasons.
#include "journal.cuh"

struct ScaleUpdateArguments {
    u64 scale;
    u64 inv_scale;
    u64 growth_tracker;
    u64 flags;
    u64 flag_count;
    u64 journal;
    double growth_factor;
    double backoff_factor;
    u32 growth_interval;
    float min_scale;
    float max_scale;
    u32 is_forced;
    float forced;
};

struct ScaleState {
    float scale;
    u32 tracker;
};

__device__ inline ScaleState next_scale(const ScaleUpdateArguments& g, ScaleState state, bool overflow) {
    double scale = double(state.scale);
    if (overflow) {
        float less = fmaxf(float(scale * g.backoff_factor), g.min_scale);
        // A scale that was below the floor already must not rise because of an overflow.
        return {fminf(less, state.scale), 0};
    }
    u32 tracker = state.tracker == 0xffffffffu ? state.tracker : state.tracker + 1;
    if (tracker < g.growth_interval) return {state.scale, tracker};
    float grown = float(scale * g.growth_factor);
    if (!is_finite(grown)) return {state.scale, 0};
    return {fminf(grown, fmaxf(g.max_scale, state.scale)), 0};
}

ENTRY(scale_update, ScaleUpdateArguments) {
    if (thread_of_grid() > 0) return;
    float* scale = pointer<float>(arguments.scale);
    u32* tracker = pointer<u32>(arguments.growth_tracker);
    float* flags = pointer<float>(arguments.flags);
    double* journal = pointer<double>(arguments.journal);

    bool overflow = false;
    for (u64 index = 0; index < arguments.flag_count; index++) {
        // NaN is not equal to 0 either.
        overflow = overflow || flags[index] != 0.0f;
        flags[index] = 0.0f;
    }
    ScaleState before = {*scale, *tracker};
    ScaleState after = {arguments.forced, before.tracker};
    if (!arguments.is_forced) after = next_scale(arguments, before, overflow);
    *scale = after.scale;
    *pointer<float>(arguments.inv_scale) = float(1.0 / double(after.scale));
    *tracker = after.tracker;

    journal[UPDATES] += 1.0;
    if (!arguments.is_forced) {
        if (overflow) journal[BACKOFFS] += 1.0;
        if (after.scale > before.scale) journal[GROWTHS] += 1.0;
    }
    if (bits_of(after.scale) != bits_of(before.scale)) {
        double* change = journal + CHANGES_START + u64(journal[CHANGES]) % SCALE_CHANGES * CHANGE_WORDS;
        change[0] = journal[UPDATES];
        change[1] = double(after.scale);
        journal[CHANGES] += 1.0;
    }
}

// Counts one step, and remembers which gradients were to blame if it was skipped, and which weights became infinite
// or NaN if it was applied.
//
// Launch: one thread of one block does all; only a step that was skipped or lost weights reads more than a few
// numbers. Same bits as the twin, src/launch/journal.rs.
#include "journal.cuh"
#include "update_pass.cuh"

struct StepRecordArguments {
    u64 journal;
    u64 found_inf;
    u64 scale;
    u64 counts;
    u64 tensors;
    u64 total_norm;
    u64 optimizer;
    u64 step;
    // What optimizer kernels counted (update_pass.cuh), 0 if they do not, and of how many tensors.
    u64 found;
    u64 found_tensors;
};

struct Offenders {
    bool inf, nan;
};

// Copies the first offending gradients out of `counts`, and counts all. Tells of what kinds they are.
__device__ inline Offenders write_overflow(double* entry, const u32* counts, u64 tensors) {
    u64 offending = 0;
    Offenders kinds = {false, false};
    for (u64 tensor = 0; tensor < tensors; tensor++) {
        const u32* words = counts + 4 * tensor;
        u64 first = u64(words[2]) | u64(words[3]) << 32;
        if (first == ~u64(0)) continue;
        kinds.inf = kinds.inf || words[0] > 0;
        kinds.nan = kinds.nan || words[1] > 0;
        if (offending < NAMED) {
            double* place = entry + OVERFLOW_HEAD + offending * NAMED_WORDS;
            place[0] = double(tensor);
            place[1] = double(words[0]);
            place[2] = double(words[1]);
            place[3] = double(first);
        }
        offending++;
    }
    entry[4] = double(offending);
    return kinds;
}

// Moves what the step found out about weights into the journal.
__device__ inline void record_lost(double* journal, const StepRecordArguments& g, double scale) {
    u64* found = pointer<u64>(g.found);
    if (!found || found[0] == 0) return;
    double* entry = journal + LOSSES_START + u64(journal[LOSSES]) % OVERFLOWS * OVERFLOW_WORDS;
    journal[LOSSES] += 1.0;
    journal[LOST_WEIGHTS] += double(found[0]);
    found[0] = 0;
    u64 offending = 0;
    for (u64 tensor = 0; tensor < g.found_tensors; tensor++) {
        u64* words = found + FOUND_HEAD + FOUND_WORDS * tensor;
        if (words[0] + words[1] == 0) continue;
        if (offending < NAMED) {
            double* place = entry + OVERFLOW_HEAD + offending * NAMED_WORDS;
            place[0] = double(tensor);
            place[1] = double(words[0]);
            place[2] = double(words[1]);
            place[3] = double(~words[2]);
        }
        offending++;
        for (u32 word = 0; word < FOUND_WORDS; word++) words[word] = 0;
    }
    entry[0] = double(g.step);
    entry[1] = double(g.optimizer);
    entry[2] = scale;
    entry[3] = double(not_a_number());
    entry[4] = double(offending);
}

ENTRY(step_record, StepRecordArguments) {
    if (thread_of_grid() > 0) return;
    double* journal = pointer<double>(arguments.journal);
    double scale = double(*pointer<const float>(arguments.scale));
    journal[STEPS] += 1.0;
    // NaN is not equal to 0 either.
    bool skipped = *pointer<const float>(arguments.found_inf) != 0.0f;
    if (journal[CALIBRATED] != 0.0) {
        u64 bits = u64(journal[RECENT_SKIPS]) << 1 & 0xffffffffu;
        journal[RECENT_SKIPS] = double(bits | u64(skipped));
    }
    if (!skipped) {
        journal[SKIPPED_IN_A_ROW] = 0.0;
        journal[NAN_IN_A_ROW] = 0.0;
        journal[CALIBRATED] = 1.0;
        journal[LAST_GOOD] = scale;
        record_lost(journal, arguments, scale);
        return;
    }
    double* entry = journal + OVERFLOWS_START + u64(journal[SKIPPED]) % OVERFLOWS * OVERFLOW_WORDS;
    journal[SKIPPED] += 1.0;
    journal[SKIPPED_IN_A_ROW] += 1.0;
    Offenders kinds = write_overflow(entry, pointer<const u32>(arguments.counts), arguments.tensors);
    double norm = arguments.total_norm ? *pointer<const double>(arguments.total_norm)
                                       : double(not_a_number());
    entry[0] = double(arguments.step);
    entry[1] = double(arguments.optimizer);
    entry[2] = scale;
    entry[3] = norm;
    if (kinds.nan) journal[NAN_STEPS] += 1.0;
    journal[NAN_IN_A_ROW] = kinds.nan ? journal[NAN_IN_A_ROW] + 1.0 : 0.0;
    // Without an offender of its own a step was skipped for another's sake, and says nothing.
    bool norm_is_inf = norm > 0.0 && !is_nan(norm) && !is_finite(norm);
    if (kinds.inf || (!kinds.nan && norm_is_inf)) journal[INF_STEPS_SINCE_UPDATE] += 1.0;
    else if (kinds.nan) journal[NAN_STEPS_SINCE_UPDATE] += 1.0;
}

// Counts one step, and remembers which gradients were to blame if it was skipped.
//
// Launch: one thread of one block does all; only a skipped step reads more than a flag. Same bits as the
// twin, src/launch/journal.rs.
#include "journal.cuh"

struct StepRecordArguments {
    u64 journal;
    u64 found_inf;
    u64 scale;
    u64 counts;
    u64 tensors;
    u64 total_norm;
    u64 optimizer;
    u64 step;
};

// Copies the first offending gradients out of `counts`, and counts all.
__device__ inline void write_overflow(double* entry, const u32* counts, u64 tensors) {
    u64 offending = 0;
    for (u64 tensor = 0; tensor < tensors; tensor++) {
        const u32* words = counts + 4 * tensor;
        u64 first = u64(words[2]) | u64(words[3]) << 32;
        if (first == ~u64(0)) continue;
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
}

ENTRY(step_record, StepRecordArguments) {
    if (thread_of_grid() > 0) return;
    double* journal = pointer<double>(arguments.journal);
    journal[STEPS] += 1.0;
    // NaN is not equal to 0 either.
    if (*pointer<const float>(arguments.found_inf) == 0.0f) {
        journal[SKIPPED_IN_A_ROW] = 0.0;
        return;
    }
    double* entry = journal + OVERFLOWS_START + u64(journal[SKIPPED]) % OVERFLOWS * OVERFLOW_WORDS;
    journal[SKIPPED] += 1.0;
    journal[SKIPPED_IN_A_ROW] += 1.0;
    write_overflow(entry, pointer<const u32>(arguments.counts), arguments.tensors);
    entry[0] = double(arguments.step);
    entry[1] = double(arguments.optimizer);
    entry[2] = double(*pointer<const float>(arguments.scale));
    entry[3] = arguments.total_norm ? *pointer<const double>(arguments.total_norm)
                                    : double(not_a_number());
}

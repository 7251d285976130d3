// Adam, with decoupled weight decay (AdamW) or without, with or without amsgrad, over any number of tensors.
//
//   k = k + 1                                     per tensor
//   w = w * (1 - rate * decay)                    if decay is decoupled
//   g = g + decay * w                             else, unless decay = 0
//   m = m + (g - m) * (1 - beta1)
//   v = beta2 * v + (1 - beta2) * g * g
//   x = max(x, v)                                 amsgrad: where a third state is present; else x = v
//   w = w - rate / (1 - beta1^k) * m / (sqrt(x) / sqrt(1 - beta2^k) + eps)
//
// Products and quotients are taken from the left, as in PyTorch: (1 - beta2) * g * g is finite for larger g.
// adam_prepare makes a row of numbers for each tensor of its group's settings and the step to come, in double, a thread
// a chunk, and changes nothing else; adam moves the weights, a block a chunk, and counts the step; masters, scale,
// clip, flag and state in bf16 as in update_pass.cuh. adam gives the bits of its twin from equal rows; the power in
// adam_prepare is the device's own, within 2 units in the last place of double.
// Twins: src/launch/adam.rs.
#include "update_pass.cuh"

struct PrepareArguments {
    Table table;
    StepScalars scalars;
    GroupSettings settings;
    u64 steps;
    u64 rows;
};

// Words of a group's settings, and of a tensor's row.
constexpr u32 RATE = 0, BETA1 = 1, BETA2 = 2, EPSILON = 3, DECAY = 4, IS_DECOUPLED = 5, SEED = 6;
constexpr u32 ROW_WORDS = 8, CORRECTION = 5, KEEP = 6, KEY = 7;

// The count after one more step.
__device__ inline u32 after(u32 steps) { return steps < 0xffffffffu ? steps + 1 : steps; }

ENTRY(adam_prepare, PrepareArguments) {
    if (is_skipped(arguments.scalars)) return;
    u64 threads = threads_of_grid();
    for (u64 index = thread_of_grid(); index < arguments.table.chunks; index += threads) {
        Chunk chunk(arguments.table, index);
        // Once for a tensor, by its first chunk.
        if (chunk.offset() != 0) continue;
        u64 tensor = chunk.tensor();
        const double* of = settings_of(arguments.settings, tensor);
        u32 step = after(pointer<const u32>(arguments.steps)[tensor]);
        bool decoupled = of[IS_DECOUPLED] != 0;
        double* row = pointer<double>(arguments.rows) + ROW_WORDS * tensor;
        row[RATE] = of[RATE] / (1.0 - pow(of[BETA1], double(step)));
        row[BETA1] = of[BETA1];
        row[BETA2] = of[BETA2];
        row[EPSILON] = of[EPSILON];
        row[DECAY] = decoupled ? 0.0 : of[DECAY];
        row[CORRECTION] = sqrt(1.0 - pow(of[BETA2], double(step)));
        row[KEEP] = decoupled ? 1.0 - of[RATE] * of[DECAY] : 1.0;
        u64 seed = reinterpret_cast<const u64*>(of)[SEED];
        reinterpret_cast<u64*>(row)[KEY] = random_key(seed, tensor, step);
    }
}

struct AdamArguments {
    Table table;
    StepScalars scalars;
    u64 steps;
    u64 rows;
    u64 found;
};

template <class C>
struct AdamRule {
    C rate, first_share, second_keep, second_share, epsilon, decay, correction, keep;
    bool amsgrad;

    __device__ void apply(C& w, C g, C (&state)[3]) const {
        if (decay != C(0)) g = g + decay * w;
        C m = state[0] + (g - state[0]) * first_share;
        C v = second_keep * state[1] + second_share * g * g;
        C x = amsgrad && state[2] >= v ? state[2] : v;
        C denominator = sqrt(x) / correction + epsilon;
        w = w * keep - rate * m / denominator;
        state[0] = m;
        state[1] = v;
        state[2] = x;
    }
};

ENTRY(adam, AdamArguments) {
    if (is_skipped(arguments.scalars)) return;
    for (u64 index = blockIdx.x; index < arguments.table.chunks; index += gridDim.x) {
        Chunk chunk(arguments.table, index);
        const double* row = pointer<const double>(arguments.rows) + ROW_WORDS * chunk.tensor();
        u64 key = reinterpret_cast<const u64*>(row)[KEY];
        // Counted once, by the block of the first chunk; no other reads the count.
        if (chunk.offset() == 0 && threadIdx.x == 0) {
            u32* steps = pointer<u32>(arguments.steps) + chunk.tensor();
            *steps = after(*steps);
        }
        update_chunk<3, true>(chunk, arguments.scalars, key, arguments.found, [&](auto compute) {
            typedef decltype(compute) C;
            return AdamRule<C>{C(row[RATE]),      C(1.0 - row[BETA1]), C(row[BETA2]),
                               C(1.0 - row[BETA2]), C(row[EPSILON]),   C(row[DECAY]),
                               C(row[CORRECTION]), C(row[KEEP]),       chunk.address(STATE + 2) != 0};
        });
    }
}

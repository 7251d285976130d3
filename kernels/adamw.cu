// AdamW: Adam with decoupled weight decay, over any number of tensors.
//
//   k = k + 1                                     per tensor
//   w = w * (1 - rate * decay)
//   m = m + (g - m) * (1 - beta1)
//   v = beta2 * v + (1 - beta2) * g * g
//   w = w - rate / (1 - beta1^k) * m / (sqrt(v) / sqrt(1 - beta2^k) + eps)
//
// Products and quotients are taken from the left, as in PyTorch: (1 - beta2) * g * g is finite for larger g.
// adamw_advance counts the step and derives the bias corrections in f64, a thread a chunk; adamw moves the
// weights, a block a chunk; scale, clip and flag as in update_pass.cuh. adamw gives the bits of its twin from
// equal corrections; the power in adamw_advance is the device's own, within 2 units in the last place of f64.
// Twins: src/launch/adamw.rs.
#include "update_pass.cuh"

struct AdvanceArguments {
    Table table;
    StepScalars scalars;
    u64 steps;
    u64 corrections;
    double beta1;
    double beta2;
};

ENTRY(adamw_advance, AdvanceArguments) {
    if (is_skipped(arguments.scalars)) return;
    u64 threads = threads_of_grid();
    for (u64 index = thread_of_grid(); index < arguments.table.chunks; index += threads) {
        Chunk chunk(arguments.table, index);
        // A tensor steps once, by its first chunk.
        if (chunk.offset() != 0) continue;
        u64 tensor = chunk.tensor();
        u32* steps = pointer<u32>(arguments.steps) + tensor;
        if (*steps < 0xffffffffu) *steps += 1;
        double* corrections = pointer<double>(arguments.corrections) + 2 * tensor;
        corrections[0] = 1.0 - pow(arguments.beta1, double(*steps));
        corrections[1] = sqrt(1.0 - pow(arguments.beta2, double(*steps)));
    }
}

struct AdamWArguments {
    Table table;
    StepScalars scalars;
    u64 corrections;
    double learning_rate;
    double beta1;
    double beta2;
    double epsilon;
    double weight_decay;
};

template <class C>
struct AdamWRule {
    C keep, first_share, second_keep, second_share, rate, correction, epsilon;

    __device__ void apply(C& w, C g, C& m, C& v) const {
        m = m + (g - m) * first_share;
        v = second_keep * v + second_share * g * g;
        C denominator = sqrt(v) / correction + epsilon;
        w = w * keep - rate * m / denominator;
    }
};

ENTRY(adamw, AdamWArguments) {
    if (is_skipped(arguments.scalars)) return;
    for (u64 index = blockIdx.x; index < arguments.table.chunks; index += gridDim.x) {
        Chunk chunk(arguments.table, index);
        const double* corrections = pointer<const double>(arguments.corrections) + 2 * chunk.tensor();
        update_chunk<true, true>(chunk, arguments.scalars, [&](auto compute) {
            typedef decltype(compute) C;
            return AdamWRule<C>{C(1.0 - arguments.learning_rate * arguments.weight_decay),
                                C(1.0 - arguments.beta1),
                                C(arguments.beta2),
                                C(1.0 - arguments.beta2),
                                C(arguments.learning_rate / corrections[0]),
                                C(corrections[1]),
                                C(arguments.epsilon)};
        });
    }
}

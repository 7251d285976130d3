// Stochastic gradient descent with momentum, over any number of tensors.
//
//   g = g + decay * w
//   b = momentum * b + g
//   w = w - rate * (g + momentum * b  if nesterov, else b)
//
// Without momentum there is no buffer, and g stands for b. Launch: a block takes a chunk of the table at a
// time; scale, clip and flag as in update_pass.cuh. Same bits as the twin, src/launch/sgd.rs.
#include "update_pass.cuh"

struct SgdArguments {
    Table table;
    StepScalars scalars;
    double learning_rate;
    double momentum;
    double weight_decay;
    u32 nesterov;
};

template <class C, bool MOMENTUM>
struct SgdRule {
    C rate, momentum, decay;
    bool nesterov;

    __device__ void apply(C& w, C g, C& b, C&) const {
        g = g + decay * w;
        C direction = g;
        if (MOMENTUM) {
            b = momentum * b + g;
            direction = nesterov ? g + momentum * b : b;
        }
        w = w - rate * direction;
    }
};

template <bool MOMENTUM>
__device__ void sgd_chunk(const SgdArguments& g, const Chunk& chunk) {
    update_chunk<MOMENTUM, false>(chunk, g.scalars, [&](auto compute) {
        typedef decltype(compute) C;
        return SgdRule<C, MOMENTUM>{C(g.learning_rate), C(g.momentum), C(g.weight_decay),
                                    g.nesterov != 0};
    });
}

ENTRY(sgd, SgdArguments) {
    if (is_skipped(arguments.scalars)) return;
    for (u64 index = blockIdx.x; index < arguments.table.chunks; index += gridDim.x) {
        Chunk chunk(arguments.table, index);
        if (chunk.address(STATE)) sgd_chunk<true>(arguments, chunk);
        else sgd_chunk<false>(arguments, chunk);
    }
}

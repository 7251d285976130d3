// Stochastic gradient descent with momentum, over any number of tensors.
//
//   g = g + decay * w
//   b = momentum * b + g
//   w = w - rate * (g + momentum * b  if nesterov, else b)
//
// Without momentum there is no buffer, and g stands for b. Launch: a block takes a chunk of the table at a
// time; masters, scale, clip and flag as in update_pass.cuh. Same bits as the twin, src/launch/sgd.rs.
#include "update_pass.cuh"

struct SgdArguments {
    Table table;
    StepScalars scalars;
    GroupSettings settings;
    u64 found;
};

// Words of a group's settings.
constexpr u32 SGD_RATE = 0, SGD_MOMENTUM = 1, SGD_DECAY = 2, SGD_NESTEROV = 3;

template <class C, bool MOMENTUM>
struct SgdRule {
    C rate, momentum, decay;
    bool nesterov;

    __device__ void apply(C& w, C g, C (&state)[1]) const {
        g = g + decay * w;
        C direction = g;
        if (MOMENTUM) {
            C b = momentum * state[0] + g;
            direction = nesterov ? g + momentum * b : b;
            state[0] = b;
        }
        w = w - rate * direction;
    }
};

template <bool MOMENTUM>
__device__ void sgd_chunk(const SgdArguments& g, const Chunk& chunk) {
    const double* of = settings_of(g.settings, chunk.tensor());
    update_chunk<MOMENTUM ? 1 : 0, false>(chunk, g.scalars, 0, g.found, [&](auto compute) {
        typedef decltype(compute) C;
        return SgdRule<C, MOMENTUM>{C(of[SGD_RATE]), C(of[SGD_MOMENTUM]), C(of[SGD_DECAY]),
                                    of[SGD_NESTEROV] != 0};
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

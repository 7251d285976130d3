// Clipping by total norm: the coefficient, and the pass that applies it.
//
//   n    = total norm of all tensors, from the statistics of a check, in f64
//   coef = min(1, max_norm / (n + 1e-6)), NaN if n is NaN
//   g    = g * coef
//
// Launch: clip_coefficient is one block; multiply gives a block a chunk of the table at a time. n agrees with
// the twin's to 1e-15 times the number of tensors, multiply to the bit. Twins: src/launch/clip.rs.
#include "chunk_table.cuh"
#include "norm.cuh"

struct ClipCoefficientArguments {
    u64 norms;
    u64 tensors;
    u64 total_norm;
    u64 coefficient;
    u64 found_inf;
    double max_norm;
    u32 kind;
};

// PyTorch's arithmetic: a reciprocal, then a product, in float; unless the norm overflows there.
__device__ inline float clip_coefficient_of(double total_norm, double max_norm) {
    float narrow = float(total_norm);
    bool overflows = !is_finite(narrow) && is_finite(total_norm);
    float quotient = overflows ? float(max_norm / total_norm)
                               : 1.0f / (narrow + 1e-6f) * float(max_norm);
    return quotient > 1.0f ? 1.0f : quotient;
}

ENTRY(clip_coefficient, ClipCoefficientArguments) {
    CombineNorms combine = {arguments.kind};
    const double* norms = pointer<const double>(arguments.norms);
    double total = 0;
    for (u64 tensor = threadIdx.x; tensor < arguments.tensors; tensor += blockDim.x) {
        total = combine(total, norms[tensor]);
    }
    total = reduce_block(total, 0.0, combine);
    if (arguments.kind == L2) total = sqrt(total);
    if (threadIdx.x > 0) return;
    *pointer<double>(arguments.total_norm) = total;
    *pointer<float>(arguments.coefficient) = clip_coefficient_of(total, arguments.max_norm);
    if (arguments.found_inf && !is_finite(total)) *pointer<float>(arguments.found_inf) = 1.0f;
}

struct MultiplyArguments {
    Table table;
    u64 factor;
};

ENTRY(multiply, MultiplyArguments) {
    float factor = *pointer<const float>(arguments.factor);
    for (u64 index = blockIdx.x; index < arguments.table.chunks; index += gridDim.x) {
        Chunk chunk(arguments.table, index);
        with_float(chunk.type(0), [&](auto type) {
            typedef typename decltype(type)::type T;
            typedef typename ComputeOf<T, T>::type C;
            Typed<T> g(chunk.address(0));
            constexpr int PACK = PackOf<Typed<T>>::value;
            u64 head = aligned_from<PACK>(chunk.len(), g);
            walk<PACK>(chunk.len(), head, threadIdx.x, blockDim.x, [&](u64 at, auto count) {
                constexpr int COUNT = decltype(count)::value;
                C values[COUNT];
                g.template load<COUNT>(at, values);
#pragma unroll
                for (int i = 0; i < COUNT; i++) values[i] = values[i] * C(factor);
                g.template store<COUNT>(at, values);
            });
        });
    }
}

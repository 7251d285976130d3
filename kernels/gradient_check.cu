// One pass over all gradients: are they finite, how many are not, and how large are they.
//
//   r     = g * inv_scale, in float (double for f64 gradients)
//   flag  = 1 if any r is infinite or NaN
//   stats = per tensor: sum of r^2 (or of |r|, or max |r|) in f64; how many r are infinite, how many NaN, and
//           the place of the first that is either
//
// gradient_unscale also writes r over g, rounded once, and judges what it wrote.
//
// Launch: a block takes a chunk of the table at a time. It leaves what it found in the table's scratch; the
// block that is last to finish adds the chunks up, a warp for each tensor, so that the order of every sum is
// fixed. Flags and counts are those of the twin exactly; sums agree to 1e-13. Twin:
// src/launch/gradient_check.rs.
#include "findings.cuh"

struct GradientCheckArguments {
    Table table;
    u64 inv_scale;
    Findings to;
    u32 kind;
};

template <bool WRITE, class T>
__device__ Partial check_chunk(const Chunk& chunk, float inv_scale, u32 kind) {
    typedef typename ComputeOf<T, T>::type C;
    C inv = C(inv_scale);
    bool multiply = inv != C(1);
    Typed<T> g(chunk.address(0));
    constexpr int PACK = PackOf<Typed<T>>::value;
    u64 len = chunk.len(), offset = chunk.offset(), head = aligned_from<PACK>(len, g);
    Partial own;
    auto load = [&](u64 index, C* r, auto count) { g.template load<decltype(count)::value>(index, r); };
    auto use = [&](u64 index, C* r, auto count) {
        constexpr int COUNT = decltype(count)::value;
        if (multiply) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) r[i] = r[i] * inv;
            if (WRITE) g.template store<COUNT>(index, r);
        }
        // What was rounded into the gradient is what counts.
#pragma unroll
        for (int i = 0; i < COUNT && WRITE; i++) r[i] = widen<C>(Narrow<T>::from(r[i]));
        own.take<COUNT>(r, offset + index, kind);
    };
    walk_pairs<C, PACK>(len, head, threadIdx.x, blockDim.x, load, use);
    return over_block(own, kind);
}

// Adds up the chunks of each tensor, a warp a tensor.
__device__ inline void finish(const GradientCheckArguments& g, const u64* partials) {
    for (u64 tensor = threadIdx.x / WARP; tensor < g.table.tensors; tensor += blockDim.x / WARP) {
        Partial own;
        u64 end = first_chunk(g.table, tensor + 1);
        for (u64 chunk = first_chunk(g.table, tensor) + threadIdx.x % WARP; chunk < end; chunk += WARP) {
            own.add(partials + chunk * SCRATCH_WORDS, g.kind);
        }
        conclude(g.to, tensor, own, g.kind);
    }
}

template <bool WRITE>
__device__ void gradient_check(const GradientCheckArguments& g) {
    float inv_scale = g.inv_scale ? *pointer<const float>(g.inv_scale) : 1.0f;
    u64 *arrived = scratch(g.table), *partials = arrived + 1;
    for (u64 index = blockIdx.x; index < g.table.chunks; index += gridDim.x) {
        Chunk chunk(g.table, index);
        with_float(chunk.type(0), [&](auto type) {
            typedef typename decltype(type)::type T;
            Partial partial = check_chunk<WRITE, T>(chunk, inv_scale, g.kind);
            if (threadIdx.x == 0) partial.write(partials + index * SCRATCH_WORDS);
        });
    }
    __shared__ bool is_last;
    if (threadIdx.x == 0) {
        // What this block wrote must be seen before it is counted.
        __threadfence();
        is_last = atomicAdd(arrived, u64(1)) == gridDim.x - 1;
        if (is_last) {
            __threadfence();
            *arrived = 0;
        }
    }
    __syncthreads();
    if (is_last) finish(g, partials);
}

ENTRY_IN_BLOCKS(gradient_check, GradientCheckArguments, 4) { gradient_check<false>(arguments); }
ENTRY(gradient_unscale, GradientCheckArguments) { gradient_check<true>(arguments); }

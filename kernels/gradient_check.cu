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
#include "chunk_table.cuh"
#include "norm.cuh"

constexpr u64 NO_INDEX = ~u64(0);

struct GradientCheckArguments {
    Table table;
    u64 inv_scale;
    u64 found_inf;
    u64 norms;
    u64 counts;
    u32 kind;
};

struct Partial {
    double norm = 0;
    u64 inf = 0;
    u64 nan = 0;
    u64 first = NO_INDEX;

    // Takes elements of which the first has the number `index`. For 16-bit types memory is fast enough that every
    // instruction for an element shows, so kind and finiteness cost one branch each for all of them.
    template <int COUNT, class C>
    __device__ void take(const C* r, u64 index, u32 kind) {
        C off = C(0);
        if (kind == L2) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) norm = norm + double(r[i]) * double(r[i]);
        } else {
            CombineNorms combine = {kind};
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                double value = double(r[i]);
                norm = combine(norm, value < 0 ? -value : value);
            }
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) off = off + (r[i] - r[i]);
        // NaN if any element is infinite or NaN.
        if (off == C(0)) return;
        for (int i = 0; i < COUNT; i++) {
            if (is_finite(r[i])) continue;
            if (is_nan(r[i])) nan++;
            else inf++;
            if (index + i < first) first = index + i;
        }
    }
};

__device__ inline Partial over_block(Partial own, u32 kind) {
    Partial total;
    total.norm = reduce_block(own.norm, 0.0, CombineNorms{kind});
    // Almost always there is nothing to count.
    if (__syncthreads_or(own.first != NO_INDEX)) {
        total.inf = reduce_block(own.inf, u64(0), Plus{});
        total.nan = reduce_block(own.nan, u64(0), Plus{});
        total.first = reduce_block(own.first, NO_INDEX, Minimum{});
    }
    return total;
}

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
    CombineNorms combine = {g.kind};
    u32 lane = threadIdx.x % WARP;
    for (u64 tensor = threadIdx.x / WARP; tensor < g.table.tensors; tensor += blockDim.x / WARP) {
        Partial own;
        u64 end = first_chunk(g.table, tensor + 1);
        for (u64 chunk = first_chunk(g.table, tensor) + lane; chunk < end; chunk += WARP) {
            const u64* partial = partials + chunk * SCRATCH_WORDS;
            own.norm = combine(own.norm, __longlong_as_double((long long)partial[0]));
            own.inf += partial[1];
            own.nan += partial[2];
            own.first = Minimum{}(own.first, partial[3]);
        }
        double norm = reduce_warp(own.norm, combine);
        u64 inf = reduce_warp(own.inf, Plus{}), nan = reduce_warp(own.nan, Plus{});
        u64 first = reduce_warp(own.first, Minimum{});
        if (lane > 0) continue;
        pointer<double>(g.norms)[tensor] = norm;
        u32* counts = pointer<u32>(g.counts) + 4 * tensor;
        counts[0] = inf < 0xffffffffu ? u32(inf) : 0xffffffffu;
        counts[1] = nan < 0xffffffffu ? u32(nan) : 0xffffffffu;
        counts[2] = u32(first);
        counts[3] = u32(first >> 32);
        if (inf + nan > 0) *pointer<float>(g.found_inf) = 1.0f;
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
            if (threadIdx.x > 0) return;
            u64* words = partials + index * SCRATCH_WORDS;
            words[0] = u64(__double_as_longlong(partial.norm));
            words[1] = partial.inf;
            words[2] = partial.nan;
            words[3] = partial.first;
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

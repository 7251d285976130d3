// What is found about gradients: sums of squares (or of magnitudes, or the largest), counts of what is not finite.
//
// A block leaves what it found about its chunk as SCRATCH_WORDS words, its Partial; a warp adds up those of a
// tensor, in the order of its lanes, so that the order of every sum is fixed. Twin: Partial in
// src/launch/gradient_check.rs.
#pragma once
#include "chunk_table.cuh"
#include "norm.cuh"

constexpr u64 NO_INDEX = ~u64(0);

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

    // As words in memory, and what such words say added to this.
    __device__ void write(u64* words) const {
        words[0] = u64(__double_as_longlong(norm));
        words[1] = inf;
        words[2] = nan;
        words[3] = first;
    }
    __device__ void add(const u64* words, u32 kind) {
        norm = CombineNorms{kind}(norm, __longlong_as_double((long long)words[0]));
        inf += words[1];
        nan += words[2];
        first = Minimum{}(first, words[3]);
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


// Where the findings about each tensor go: a float, a double a tensor, four words a tensor.
struct Findings {
    u64 found_inf;
    u64 norms;
    u64 counts;
};

// What the lanes of a warp added up is what was found about `tensor`.
__device__ inline void conclude(const Findings& to, u64 tensor, const Partial& own, u32 kind) {
    double norm = reduce_warp(own.norm, CombineNorms{kind});
    u64 inf = reduce_warp(own.inf, Plus{}), nan = reduce_warp(own.nan, Plus{});
    u64 first = reduce_warp(own.first, Minimum{});
    if (threadIdx.x % WARP > 0) return;
    pointer<double>(to.norms)[tensor] = norm;
    u32* counts = pointer<u32>(to.counts) + 4 * tensor;
    counts[0] = inf < 0xffffffffu ? u32(inf) : 0xffffffffu;
    counts[1] = nan < 0xffffffffu ? u32(nan) : 0xffffffffu;
    counts[2] = u32(first);
    counts[3] = u32(first >> 32);
    if (inf + nan > 0) *pointer<float>(to.found_inf) = 1.0f;
}

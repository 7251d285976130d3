// Reductions in a fixed order: the lanes of a warp by halves, then the warps of a block in their order. The
// result does not depend on timing. All threads of the warp, or block, must take part.
#pragma once
#include "access.cuh"

// `op` of the values of all lanes, in every lane. `op` must be commutative, so that all lanes agree.
template <class T, class Op>
__device__ inline T reduce_warp(T value, Op op) {
    for (u32 offset = WARP / 2; offset > 0; offset /= 2) {
        value = op(value, __shfl_xor_sync(ALL_LANES, value, offset));
    }
    return value;
}

struct Plus {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};

struct Minimum {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return b < a ? b : a;
    }
};

// Where one does not compare, the first.
struct Larger {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return b > a ? b : a;
    }
};

// Of non-negative numbers; NaN wins.
struct MaximumOrNan {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return b > a || b != b ? b : a;
    }
};

// `op` of the values of all threads of a block of at most 1024, in every thread.
template <class T, class Op>
__device__ inline T reduce_block(T value, T nothing, Op op) {
    __shared__ T warps[32];
    value = reduce_warp(value, op);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = value;
    __syncthreads();
    T total = nothing;
    for (u32 warp = 0; warp < blockDim.x / WARP; warp++) total = op(total, warps[warp]);
    // The next call must not overwrite what a slower thread still reads.
    __syncthreads();
    return total;
}

// The sum of `len` numbers in double, in every thread of the block that adds them up alone.
template <class T>
__device__ inline double sum_by_block(const Typed<T>& x, u64 len) {
    constexpr int PACK = PackOf<Typed<T>>::value;
    u64 head = aligned_from<PACK>(len, x);
    double total = 0;
    walk<PACK>(len, head, threadIdx.x, blockDim.x, [&](u64 index, auto count) {
        constexpr int COUNT = decltype(count)::value;
        double values[COUNT];
        x.template load<COUNT>(index, values);
#pragma unroll
        for (int i = 0; i < COUNT; i++) total += values[i];
    });
    return reduce_block(total, 0.0, Plus{});
}

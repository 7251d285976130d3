// The next scale of each tensor that is kept in 8 bits.
//
//   a       = largest of the history, or its first, the running one
//   scale   = largest number of the type / a / 2^margin, from 2^-126 to the largest float; if told to, less its
//             fraction, which leaves a power of two
//   history = rolled: the running one goes to the end, the oldest, next to it, is dropped, and 0 begins anew
//
// A running largest of 0, infinity or NaN changes neither: an overflow must leave no mark in the history, which
// would hide all that comes after it. Without history (`is_current`) there is only the running one, taken to be
// at least `epsilon`; where it tells nothing, the scale is 1.
//
// Shapes: history has a row for each tensor. Launch: a block a tensor. Same bits as the twin,
// src/launch/fp8_update.rs.
#include "dtype.cuh"
#include "reduction.cuh"

struct Fp8UpdateArguments {
    u64 scales;
    u64 largest;
    u64 history;
    u64 counts;
    u64 tensors;
    u64 length;
    double divisor;
    float epsilon;
    u32 is_current;
    u32 most_recent;
    u32 power_of_two;
};

// Words of a tensor's counts, f64: places as in src/launch/quantize.rs.
constexpr u32 UPDATES_SEEN = 4, NOT_FINITE = 5, LAST_AMAX = 6, COUNTS_OF_TENSOR = 7;

__device__ inline float fp8_scale(const Fp8UpdateArguments& g, float largest, float amax) {
    constexpr float SMALLEST = 1.17549435e-38f, LARGEST = 3.40282347e38f;
    float scale = float(double(largest) / double(amax) / g.divisor);
    scale = fminf(fmaxf(scale, SMALLEST), LARGEST);
    return g.power_of_two ? float_of(bits_of(scale) & 0x7f800000u) : scale;
}

// Moves a row one place to its start; `last` goes to the end, and 0 to the start.
__device__ inline void roll(float* row, u64 length, float last) {
    for (u64 base = 0; base < length; base += blockDim.x) {
        u64 at = base + threadIdx.x;
        float value = at + 1 < length ? row[at + 1] : last;
        // What this round writes, it must have read before.
        __syncthreads();
        if (at < length) row[at] = at == 0 ? 0.0f : value;
    }
}

__device__ inline void update_tensor(const Fp8UpdateArguments& g, u64 tensor) {
    float* row = pointer<float>(g.history) + tensor * g.length;
    float recent = row[0], window = recent;
    bool tells = is_finite(recent) && recent > 0;
    if (g.is_current) {
        window = is_finite(recent) ? fmaxf(recent, g.epsilon) : recent;
    } else if (tells && !g.most_recent) {
        for (u64 at = threadIdx.x; at < g.length; at += blockDim.x) window = Larger{}(window, row[at]);
        window = reduce_block(window, 0.0f, Larger{});
    }
    // All threads have read the first of the row.
    __syncthreads();
    if (tells && !g.is_current) roll(row, g.length, recent);
    if (threadIdx.x > 0) return;
    row[0] = 0.0f;
    float* scale = pointer<float>(g.scales) + tensor;
    bool moves = is_finite(window) && window > 0;
    if (moves && (tells || g.is_current)) *scale = fp8_scale(g, pointer<const float>(g.largest)[tensor], window);
    else if (g.is_current) *scale = 1.0f;
    double* counts = pointer<double>(g.counts) + tensor * COUNTS_OF_TENSOR;
    counts[UPDATES_SEEN] += 1.0;
    if (!is_finite(recent)) counts[NOT_FINITE] += 1.0;
    if (recent != 0.0f) counts[LAST_AMAX] = double(recent);
}

ENTRY(fp8_update, Fp8UpdateArguments) {
    for (u64 tensor = blockIdx.x; tensor < arguments.tensors; tensor += gridDim.x) {
        update_tensor(arguments, tensor);
    }
}

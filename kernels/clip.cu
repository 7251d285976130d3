// Clipping by total norm: the coefficient, and the pass that applies it.
//
//   n    = total norm of all tensors, from the statistics of a check, in f64
//   coef = min(1, max_norm / (n + eps)), NaN if n is NaN; eps = 1e-6 for limits of 0.1 and more, else 0
//   g    = g * first * coef
//
// `first` is the inverse scale, or 1. If coef is smaller than the normal numbers of float, `first` takes over a
// power of two, so that neither factor loses bits.
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
    u64 first;
    u64 inv_scale;
    u64 found_inf;
    double max_norm;
    u32 kind;
    u32 coefficient_type;
};

struct ClipFactors {
    float first;
    double coefficient;
};

constexpr double EPSILON_FROM = 0.1;

// PyTorch's arithmetic where it is accurate: a reciprocal, then a product, in the compute type of the gradients.
__device__ inline double clip_quotient(double total_norm, double max_norm, bool wide) {
    if (max_norm >= EPSILON_FROM && wide) {
        double reciprocal = 1.0 / (total_norm + 1e-6);
        if (!(reciprocal < 2.2250738585072014e-308)) return reciprocal * max_norm;
    } else if (max_norm >= EPSILON_FROM) {
        float reciprocal = 1.0f / (float(total_norm) + 1e-6f);
        if (!(reciprocal < 1.17549435e-38f)) return double(reciprocal * float(max_norm));
    }
    if (total_norm == 0.0) return max_norm == 0.0 ? 0.0 : 1.0;
    return max_norm / total_norm;
}

__device__ inline ClipFactors clip_factors(double total_norm, double max_norm, float inv_scale, bool wide) {
    double quotient = clip_quotient(total_norm, max_norm, wide);
    if (quotient > 1.0) quotient = 1.0;
    // NaN passes, too.
    bool is_normal = !(quotient < 1.1754943508222875e-38);
    if (is_normal || max_norm == 0.0 || !is_finite(total_norm)) return {inv_scale, quotient};
    // As large as leaves the first factor a normal number.
    u32 exponent = bits_of(inv_scale) >> 23 & 0xff, shift = exponent == 0 ? 0 : exponent - 1;
    if (shift > 126) shift = 126;
    double power = __longlong_as_double((long long)(1023 + shift) << 52);
    return {inv_scale * float_of((127 - shift) << 23), max_norm * power / total_norm};
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
    float inv_scale = arguments.inv_scale ? *pointer<const float>(arguments.inv_scale) : 1.0f;
    bool wide = arguments.coefficient_type == F64;
    ClipFactors factors = clip_factors(total, arguments.max_norm, inv_scale, wide);
    *pointer<float>(arguments.first) = factors.first;
    if (wide) *pointer<double>(arguments.coefficient) = factors.coefficient;
    else *pointer<float>(arguments.coefficient) = float(factors.coefficient);
    if (arguments.found_inf && !is_finite(total)) *pointer<float>(arguments.found_inf) = 1.0f;
}

struct MultiplyArguments {
    Table table;
    // A float, and a float or double.
    u64 first;
    u64 second;
    u32 second_type;
};

ENTRY(multiply, MultiplyArguments) {
    float first = *pointer<const float>(arguments.first);
    bool wide = arguments.second_type == F64;
    double second = wide ? *pointer<const double>(arguments.second) : double(*pointer<const float>(arguments.second));
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
                for (int i = 0; i < COUNT; i++) values[i] = values[i] * C(first) * C(second);
                g.template store<COUNT>(at, values);
            });
        });
    }
}

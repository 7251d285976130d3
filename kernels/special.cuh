// Special functions of one real variable, for float and double: exponential and normal distribution.
//
// The float forms are those of src/launch/special.rs, operation by operation, so that they give the same
// bits; their comments derive them. The double forms use the library where there is a function.
#pragma once
#include "dtype.cuh"

__device__ inline float exponential(float x) {
    // Below the first and above the second, the result is 0 and infinity. A NaN passes.
    if (x < -105.0f) x = -105.0f;
    if (x > 89.0f) x = 89.0f;
    const float TO_INTEGER = 12582912.0f;
    float shifted = x * 1.44269504f + TO_INTEGER;
    float n = shifted - TO_INTEGER;
    float r = x - n * (355.0f / 512.0f) - n * -2.1219444e-4f;
    const float SERIES[8] = {1.0f / 5040.0f, 1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f,
                             1.0f / 6.0f,    0.5f,          1.0f,          1.0f};
    float power = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) power = power * r + SERIES[i];
    int whole = int(bits_of(shifted) - bits_of(TO_INTEGER));
    int half = whole >> 1;
    return power * float_of(u32(half + 127) << 23) * float_of(u32(whole - half + 127) << 23);
}

__device__ inline double exponential(double x) { return exp(x); }

template <class C>
struct Erfc;
template <>
struct Erfc<float> {
    static constexpr int TERMS = 12;
    static __device__ float sqrt2() { return 1.41421356237309504880f; }
};
template <>
struct Erfc<double> {
    static constexpr int TERMS = 29;
    static __device__ double sqrt2() { return 1.41421356237309504880; }
};

// The probability that a standard normal variable is at most `x`.
template <class C>
__device__ inline C normal_cdf(C x) {
    const double TERMS[29] = {
        -0.6513268598908547,    0.6419697923564902,     0.019476473204185836,
        -0.009561514786808632,  -0.0009465953444820369, 0.00036683949785276145,
        4.252332480690777e-5,   -2.0278578112534243e-5, -1.6242900046470255e-6,
        1.3036558355805232e-6,  1.5626441722066143e-8,  -8.523809591492654e-8,
        6.52905443909885e-9,    5.059343495551469e-9,   -9.91364156493033e-10,
        -2.273651222931836e-10, 9.646791102015527e-11,  2.3940380830391147e-12,
        -6.886027526497553e-12, 8.944879273090726e-13,  3.130921399342958e-13,
        -1.1270822361252367e-13, 3.810905255189232e-16, 7.106097613609237e-15,
        -1.5230282014571043e-15, -9.457494571291234e-17, 1.210237189224279e-16,
        -2.816633087747177e-17, 5.00300555594459e-20,
    };
    C z = (x < C(0) ? -x : x) / Erfc<C>::sqrt2();
    C t = C(2) / (C(2) + z), y = C(2) * t - C(1);
    C b1 = C(0), b2 = C(0);
#pragma unroll
    for (int i = Erfc<C>::TERMS - 1; i > 0; i--) {
        C next = C(2) * y * b1 + (C(TERMS[i]) - b2);
        b2 = b1;
        b1 = next;
    }
    C polynomial = y * b1 - b2 + C(TERMS[0]);
    C tail = t * exponential(polynomial - z * z) / C(2);
    return x > C(0) ? C(1) - tail : tail;
}

// Element types and their conversions: one rounding, to nearest, ties to even; overflow goes to infinity (to
// NaN in e4m3, which has none), NaN stays NaN.
//
// f16 goes through the conversion instructions of the device; everything else is plain arithmetic on bits,
// the same on both sides. Values agree with the Rust side to the bit, payloads of NaN may not.
#pragma once
#include "entry.cuh"

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

// The 8-bit types (see src/dtype/f8.rs): TOO_LARGE are the bits of the smallest float that overflows, OVERFLOW
// is the code it gets. One below that is the code of the largest number.
struct f8e4m3 {
    static constexpr u32 FRACTION = 3, BIAS = 7, TOO_LARGE = 0x43e80001u, OVERFLOW = 0x7f;
    u8 bits;
};
struct f8e5m2 {
    static constexpr u32 FRACTION = 2, BIAS = 15, TOO_LARGE = 0x47700000u, OVERFLOW = 0x7c;
    u8 bits;
};
constexpr u32 F8_NAN = 0x7f;

template <class T>
struct IsF8 {
    static constexpr bool value = false;
};
template <>
struct IsF8<f8e4m3> {
    static constexpr bool value = true;
};
template <>
struct IsF8<f8e5m2> {
    static constexpr bool value = true;
};

// Type codes, the places in `DType::ALL`. No body looks at those of the 8-bit types.
constexpr u32 F16 = 0, BF16 = 1, F32 = 2, F64 = 3, U32 = 4;

__device__ inline u32 bits_of(float value) { return __float_as_uint(value); }
__device__ inline float float_of(u32 bits) { return __uint_as_float(bits); }

__device__ inline float not_a_number() { return float_of(0x7fc00000u); }

// By comparison, so that no library is asked.
template <class C>
__device__ inline bool is_nan(C value) {
    return value != value;
}
template <class C>
__device__ inline bool is_finite(C value) {
    return value - value == C(0);
}

#ifdef KITSUNE_SHIM

inline float f16_to_f32(u16 half) {
    u32 sign = u32(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ff;
    if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
    if (exponent > 0) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    // Subnormal: the fraction counts units of 2^-24.
    float magnitude = float(fraction) * (1.0f / 16777216.0f);
    return float_of(sign | bits_of(magnitude));
}

inline u16 f32_to_f16(float value) {
    u32 bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    u16 sign = u16(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000u) return sign | 0x7e00;
    // From 65520 on the nearest is infinity.
    if (magnitude >= 0x477ff000u) return sign | 0x7c00;
    if (magnitude >= 0x38800000u) {
        // Half a unit in the last place, less one bit for an even result; a carry moves the exponent.
        u32 rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
        return sign | u16((rounded >> 13) - (112 << 10));
    }
    // Subnormal: adding 2^-1 aligns the units of 2^-24 with the end of the fraction and rounds there.
    float aligned = float_of(magnitude) + 0.5f;
    return sign | u16(bits_of(aligned) - bits_of(0.5f));
}

#else

__device__ inline float f16_to_f32(u16 half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

__device__ inline u16 f32_to_f16(float value) {
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

#endif

__device__ inline u16 f32_to_bf16(float value) {
    u32 bits = bits_of(value);
    // Rounding could carry a NaN into infinity: keep its upper half and make it quiet.
    if (is_nan(value)) return u16(bits >> 16 | 0x40);
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class F>
__device__ inline u8 f32_to_f8(float value) {
    u32 bits = bits_of(value), magnitude = bits & 0x7fffffffu, sign = bits >> 24 & 0x80;
    if (magnitude > 0x7f800000u) return u8(sign | F8_NAN);
    if (magnitude >= F::TOO_LARGE) return u8(sign | F::OVERFLOW);
    constexpr u32 DROPPED = 23 - F::FRACTION, SMALLEST_NORMAL = (128 - F::BIAS) << 23;
    if (magnitude >= SMALLEST_NORMAL) {
        // As for f16 above.
        u32 rounded = magnitude + ((1u << (DROPPED - 1)) - 1) + (magnitude >> DROPPED & 1);
        return u8(sign | ((rounded >> DROPPED) - ((127 - F::BIAS) << F::FRACTION)));
    }
    // Adding a power of two whose unit is the smallest number of the type aligns and rounds.
    constexpr u32 ALIGNER = (23 - F::FRACTION + 128 - F::BIAS) << 23;
    return u8(sign | (bits_of(float_of(magnitude) + float_of(ALIGNER)) - ALIGNER));
}

template <class F>
__device__ inline float f8_to_f32(u8 code) {
    u32 magnitude = code & 0x7f, sign = u32(code & 0x80) << 24;
    if (magnitude >= F::OVERFLOW) {
        bool infinite = F::OVERFLOW != F8_NAN && magnitude == F::OVERFLOW;
        return infinite ? float_of(sign | 0x7f800000u) : not_a_number();
    }
    if (magnitude >> F::FRACTION > 0) {
        return float_of(sign | ((magnitude << (23 - F::FRACTION)) + ((127 - F::BIAS) << 23)));
    }
    // Subnormal: the fraction counts units.
    constexpr u32 UNIT = (128 - F::BIAS - F::FRACTION) << 23;
    return float_of(sign | bits_of(float(magnitude) * float_of(UNIT)));
}

// `value` rounded toward zero with the last bit set if anything was lost, so that rounding once more, to
// 16 or 8 bits, rounds right (see src/dtype/round.rs).
__device__ inline float round_to_odd(double value) {
    float nearest = float(value);
    if (double(nearest) == value || is_nan(value)) return nearest;
    bool away = fabs(double(nearest)) > fabs(value);
    return float_of((bits_of(nearest) - (away ? 1 : 0)) | 1);
}

// widen: to a compute type, float or double.
template <class C>
__device__ inline C widen(f16 value) {
    return C(f16_to_f32(value.bits));
}
template <class C>
__device__ inline C widen(bf16 value) {
    return C(float_of(u32(value.bits) << 16));
}
template <class C>
__device__ inline C widen(f8e4m3 value) {
    return C(f8_to_f32<f8e4m3>(value.bits));
}
template <class C>
__device__ inline C widen(f8e5m2 value) {
    return C(f8_to_f32<f8e5m2>(value.bits));
}
template <class C>
__device__ inline C widen(float value) {
    return C(value);
}
template <class C>
__device__ inline C widen(double value) {
    return C(value);
}
template <class C>
__device__ inline C widen(u32 value) {
    return C(value);
}

// narrow: from a compute type, rounded once. u32 truncates and saturates.
template <class T>
struct Narrow;
template <>
struct Narrow<f16> {
    static __device__ f16 from(float value) { return {f32_to_f16(value)}; }
    static __device__ f16 from(double value) { return {f32_to_f16(round_to_odd(value))}; }
};
template <>
struct Narrow<bf16> {
    static __device__ bf16 from(float value) { return {f32_to_bf16(value)}; }
    static __device__ bf16 from(double value) { return {f32_to_bf16(round_to_odd(value))}; }
};
template <>
struct Narrow<f8e4m3> {
    static __device__ f8e4m3 from(float value) { return {f32_to_f8<f8e4m3>(value)}; }
    static __device__ f8e4m3 from(double value) { return {f32_to_f8<f8e4m3>(round_to_odd(value))}; }
};
template <>
struct Narrow<f8e5m2> {
    static __device__ f8e5m2 from(float value) { return {f32_to_f8<f8e5m2>(value)}; }
    static __device__ f8e5m2 from(double value) { return {f32_to_f8<f8e5m2>(round_to_odd(value))}; }
};
template <>
struct Narrow<float> {
    static __device__ float from(float value) { return value; }
    static __device__ float from(double value) { return float(value); }
};
template <>
struct Narrow<double> {
    static __device__ double from(float value) { return value; }
    static __device__ double from(double value) { return value; }
};
template <>
struct Narrow<u32> {
    static __device__ u32 from(double value) {
        if (!(value > 0)) return 0;
        return value >= 4294967295.0 ? 0xffffffffu : u32(value);
    }
};

// The compute type of operands of these types: double as soon as one is.
template <class A, class B>
struct ComputeOf {
    typedef float type;
};
template <class A>
struct ComputeOf<A, double> {
    typedef double type;
};
template <class B>
struct ComputeOf<double, B> {
    typedef double type;
};
template <>
struct ComputeOf<double, double> {
    typedef double type;
};

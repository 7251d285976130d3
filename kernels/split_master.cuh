// Floats cut in two: a bf16, rounded to nearest, ties away from zero, and the 16 bits that were below it.
//
// Where those are half a unit or more, the bf16 was rounded away from zero, and one less is the upper half: so the
// two give the float back to the bit. A NaN keeps its sign only. Ties to even could not be undone: an even bf16
// would stand for 65,537 floats. Twin: src/launch/split_master.rs.
#pragma once
#include "access.cuh"

__device__ inline float join(u16 rounded, u16 low) {
    return float_of(u32(u16(rounded - (low >> 15))) << 16 | low);
}
__device__ inline u16 upper_of(float value, u16* low) {
    u32 bits = bits_of(value);
    // Rounding could carry a NaN into another sign.
    *low = is_nan(value) ? 0 : u16(bits);
    return u16(is_nan(value) ? bits >> 16 | 0x40 : (bits >> 16) + (*low >> 15));
}

// Masters whose upper halves are the parameters. `ELEMENT` is the size by which packs are chosen: 2, or 16 for none.
template <u32 ELEMENT>
struct Split {
    static constexpr u32 SIZE = ELEMENT;
    u16 *high, *low;

    __device__ Split(u64 parameter, u64 master) : high(pointer<u16>(parameter)), low(pointer<u16>(master)) {}

    __device__ u64 address() const { return reinterpret_cast<u64>(low); }

    template <int COUNT>
    __device__ void load(u64 index, float* into) const {
        NOTE_READ(2 * sizeof(u16) * COUNT);
        Pack<u16, COUNT> upper = *reinterpret_cast<const Pack<u16, COUNT>*>(high + index);
        Pack<u16, COUNT> lower = *reinterpret_cast<const Pack<u16, COUNT>*>(low + index);
#pragma unroll
        for (int i = 0; i < COUNT; i++) into[i] = join(upper.at[i], lower.at[i]);
    }

    template <int COUNT>
    __device__ void store(u64 index, const float* values) const {
        NOTE_WRITTEN(2 * sizeof(u16) * COUNT);
        Pack<u16, COUNT> upper, lower;
#pragma unroll
        for (int i = 0; i < COUNT; i++) upper.at[i] = upper_of(values[i], &lower.at[i]);
        *reinterpret_cast<Pack<u16, COUNT>*>(high + index) = upper;
        *reinterpret_cast<Pack<u16, COUNT>*>(low + index) = lower;
    }
};

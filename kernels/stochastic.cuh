// Rounding to bf16 up or down by chance, each as likely as the value is near, so that the mean is the value.
//
// The chances come from Philox2x32 with seven rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3", 2011), a function of a key and a counter: no state, and the same bits on every device. The key is made of
// seed, tensor and step, the counter is the element's index. Twin: src/launch/stochastic.rs.
#pragma once
#include "dtype.cuh"

// Finalizer of SplitMix64.
__device__ inline u64 mix(u64 value) {
    value += 0x9e3779b97f4a7c15ull;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
    return value ^ (value >> 31);
}

__device__ inline u64 random_key(u64 seed, u64 tensor, u32 step) {
    return mix(mix(mix(seed) ^ tensor) ^ step);
}

// Random bits of one element: 16 for each of up to three states.
struct Chances {
    u32 left, right;

    Chances() = default;
    __device__ Chances(u64 key, u64 index) : left(u32(index)), right(u32(index >> 32) ^ u32(key >> 32)) {
        u32 round_key = u32(key);
#pragma unroll
        for (int round = 0; round < 7; round++) {
            u64 product = u64(0xd256d193u) * left;
            left = u32(product >> 32) ^ round_key ^ right;
            right = u32(product);
            round_key += 0x9e3779b9u;
        }
    }

    __device__ u32 of(int state) const {
        return state == 0 ? left & 0xffff : state == 1 ? left >> 16 : right & 0xffff;
    }
};

// A finite value never becomes infinite: past the largest bf16 it is cut off.
__device__ inline bf16 round_by_chance(float value, u32 chance) {
    u32 bits = bits_of(value);
    if (is_nan(value)) return {u16(bits >> 16 | 0x40)};
    bool cut = (bits & 0x7fffffffu) >= 0x7f7f0000u;
    return {u16((bits + (cut ? 0 : chance)) >> 16)};
}

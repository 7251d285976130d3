// What every kernel file begins with: names of types, and the form of an entry point.
//
// The same text is compiled for the device by NVRTC and for tests by a C++ compiler behind
// tests/shim/cuda_shim.h, which defines KITSUNE_SHIM. Products and sums are not contracted in either, so
// that a formula gives the same bits as the Rust twin beside its launcher; where one rounding is wanted for
// both, `fma` says so. No header of a toolkit is needed.
//
// An entry point takes one struct by value: the fields that `Kernel::arguments` writes, in that order.
// Addresses are 64-bit numbers, 0 where an operand is absent; element types are codes, see dtype.cuh.
// Blocks have BLOCK threads unless the kernel's `grid` says otherwise.
#pragma once

#ifndef KITSUNE_SHIM
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define ENTRY(name, Arguments) extern "C" __global__ void name(Arguments arguments)
// With so few registers that `blocks` of BLOCK threads fit into a multiprocessor at a time.
#define ENTRY_IN_BLOCKS(name, Arguments, blocks) \
    extern "C" __global__ void __launch_bounds__(BLOCK, blocks) name(Arguments arguments)
#else
#define ENTRY_IN_BLOCKS(name, Arguments, blocks) ENTRY(name, Arguments)
#endif

constexpr u32 BLOCK = 256;
constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

template <class T>
__device__ inline T* pointer(u64 address) {
    return reinterpret_cast<T*>(address);
}

// This thread among those of the whole grid, and how many those are.
__device__ inline u64 thread_of_grid() { return u64(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline u64 threads_of_grid() { return u64(gridDim.x) * blockDim.x; }

// The entry points of a kernel that has one body for each float type of its operands, and one each for
// operands of different types, in either compute type. `body` is a template over the compute type and the
// access to an operand.
#define ENTRIES_BY_TYPES(op, Arguments, body)                                          \
    ENTRY(op##_f16, Arguments) { body<float, Typed<f16>>(arguments); }                 \
    ENTRY(op##_bf16, Arguments) { body<float, Typed<bf16>>(arguments); }               \
    ENTRY(op##_f32, Arguments) { body<float, Typed<float>>(arguments); }               \
    ENTRY(op##_f64, Arguments) { body<double, Typed<double>>(arguments); }             \
    ENTRY(op##_mixed_f32, Arguments) { body<float, Any>(arguments); }                  \
    ENTRY(op##_mixed_f64, Arguments) { body<double, Any>(arguments); }

// One entry point for each float type of the main operand.
#define ENTRIES_BY_FLOAT(op, Arguments, body)                                          \
    ENTRY(op##_f16, Arguments) { body<float, f16>(arguments); }                        \
    ENTRY(op##_bf16, Arguments) { body<float, bf16>(arguments); }                      \
    ENTRY(op##_f32, Arguments) { body<float, float>(arguments); }                      \
    ENTRY(op##_f64, Arguments) { body<double, double>(arguments); }

// One entry point for each float type of the main operand, and an 8-bit one that it is converted to.
#define ENTRIES_TO_F8(op, Arguments, body)                                             \
    ENTRIES_TO_EITHER_F8(op##_f16, f16, Arguments, body)                               \
    ENTRIES_TO_EITHER_F8(op##_bf16, bf16, Arguments, body)                             \
    ENTRIES_TO_EITHER_F8(op##_f32, float, Arguments, body)                             \
    ENTRIES_TO_EITHER_F8(op##_f64, double, Arguments, body)
#define ENTRIES_TO_EITHER_F8(op, From, Arguments, body)                                \
    ENTRY(op##_f8e4m3, Arguments) { body<From, f8e4m3>(arguments); }                   \
    ENTRY(op##_f8e5m2, Arguments) { body<From, f8e5m2>(arguments); }

// One entry point for each 8-bit type, and a float type that it is converted to.
#define ENTRIES_FROM_F8(op, Arguments, body)                                           \
    ENTRIES_FROM(op##_f8e4m3, f8e4m3, Arguments, body)                                 \
    ENTRIES_FROM(op##_f8e5m2, f8e5m2, Arguments, body)

// One entry point for each pair of types that can be converted into each other.
#define ENTRIES_BY_ANY_PAIR(op, Arguments, body)                                       \
    ENTRIES_BY_PAIR(op, Arguments, body)                                               \
    ENTRIES_TO_F8(op, Arguments, body)                                                 \
    ENTRIES_FROM_F8(op, Arguments, body)                                               \
    ENTRIES_TO_EITHER_F8(op##_f8e4m3, f8e4m3, Arguments, body)                         \
    ENTRIES_TO_EITHER_F8(op##_f8e5m2, f8e5m2, Arguments, body)

// One entry point for each pair of float types.
#define ENTRIES_BY_PAIR(op, Arguments, body)                                           \
    ENTRIES_FROM(op##_f16, f16, Arguments, body)                                       \
    ENTRIES_FROM(op##_bf16, bf16, Arguments, body)                                     \
    ENTRIES_FROM(op##_f32, float, Arguments, body)                                     \
    ENTRIES_FROM(op##_f64, double, Arguments, body)
#define ENTRIES_FROM(op, From, Arguments, body)                                        \
    ENTRY(op##_f16, Arguments) { body<From, f16>(arguments); }                         \
    ENTRY(op##_bf16, Arguments) { body<From, bf16>(arguments); }                       \
    ENTRY(op##_f32, Arguments) { body<From, float>(arguments); }                       \
    ENTRY(op##_f64, Arguments) { body<From, double>(arguments); }

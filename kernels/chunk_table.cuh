// The table that multi-tensor kernels read: any number of tensors, of any element types, in one launch.
//
// src/launch/chunk_table.rs describes the layout and builds it. A block takes a chunk (at most 65536
// elements of one tensor) at a time.
#pragma once
#include "access.cuh"

struct Table {
    u64 words;
    u64 columns;
    u64 chunks;
    u64 tensors;
};

constexpr u32 HEAD_WORDS = 3;
constexpr u32 TYPE_BITS = 4;

struct Chunk {
    const u64* words;

    __device__ Chunk(const Table& table, u64 index)
        : words(pointer<const u64>(table.words) + index * (HEAD_WORDS + table.columns)) {}

    __device__ u64 len() const { return words[0]; }
    __device__ u64 offset() const { return words[1]; }
    __device__ u64 tensor() const { return words[2] >> 32; }
    __device__ u32 type(u32 column) const { return u32(words[2] >> (column * TYPE_BITS)) & 15; }
    // 0 where the row has nothing in this column.
    __device__ u64 address(u32 column) const { return words[HEAD_WORDS + column]; }
};

// The first chunk of a tensor; for the number of tensors, the number of chunks.
__device__ inline u64 first_chunk(const Table& table, u64 tensor) {
    return pointer<const u64>(table.words)[table.chunks * (HEAD_WORDS + table.columns) + tensor];
}

// A word that is 0 between kernels, and SCRATCH_WORDS for each chunk with no meaning between kernels.
constexpr u32 SCRATCH_WORDS = 4;
__device__ inline u64* scratch(const Table& table) {
    return pointer<u64>(table.words) + table.chunks * (HEAD_WORDS + table.columns) + table.tensors + 1;
}

// Calls `body(type)` with a pointer-free stand-in for the element type that a code names.
template <class T>
struct As {
    typedef T type;
};
template <class Body>
__device__ inline void with_float(u32 type, Body body) {
    switch (type) {
        case F16: body(As<f16>{}); break;
        case BF16: body(As<bf16>{}); break;
        case F32: body(As<float>{}); break;
        default: body(As<double>{});
    }
}

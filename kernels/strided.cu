// Copies between layouts: `dst[sum of index * dst_stride] = src[sum of index * src_stride]` for every index
// of a shape, converted as in cast.cu.
//
// Shapes: up to 8 dimensions, outermost first. Launch: steps of the grid, neighbouring threads at
// neighbouring indices of the last dimension. Index arithmetic is 32-bit where the shape allows it: a
// division of 64-bit numbers costs more than the copy. Same bits as the twin, src/launch/strided.rs.
#include "access.cuh"

constexpr int RANK_MAX = 8;

struct StridedArguments {
    u64 src;
    u64 dst;
    u64 elements;
    u64 rank;
    u64 extent[RANK_MAX];
    u64 src_stride[RANK_MAX];
    u64 dst_stride[RANK_MAX];
};

template <class S, class D>
struct Convert {
    static __device__ D from(S value) {
        return Narrow<D>::from(widen<typename ComputeOf<S, D>::type>(value));
    }
};
template <class T>
struct Convert<T, T> {
    static __device__ T from(T value) { return value; }
};

template <class Index, class S, class D>
__device__ void copy_all(const StridedArguments& g) {
    for (u64 number = thread_of_grid(); number < g.elements; number += threads_of_grid()) {
        Index rest = Index(number);
        u64 src = 0, dst = 0;
#pragma unroll
        for (int dim = RANK_MAX - 1; dim >= 0; dim--) {
            if (dim >= int(g.rank)) continue;
            Index extent = Index(g.extent[dim]), outer = rest / extent;
            u64 index = rest - outer * extent;
            src += index * g.src_stride[dim];
            dst += index * g.dst_stride[dim];
            rest = outer;
        }
        pointer<D>(g.dst)[dst] = Convert<S, D>::from(pointer<const S>(g.src)[src]);
    }
}

template <class S, class D>
__device__ void copy_strided(const StridedArguments& g) {
    if (g.elements <= 0xffffffffu) copy_all<u32, S, D>(g);
    else copy_all<u64, S, D>(g);
}

ENTRIES_BY_ANY_PAIR(copy_strided, StridedArguments, copy_strided)
ENTRY(copy_strided_u32_u32, StridedArguments) { copy_strided<u32, u32>(arguments); }

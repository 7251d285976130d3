// Sums, means and largest elements.
//
//   sum          out[0] = (sum of x[i]) / divisor
//   argmax_rows  out[r] = first column of the largest element of row r; NaN counts as largest
//
// Launch: sum is one block of 1024 threads, so that its order is fixed without memory to meet in;
// argmax_rows gives a row to a warp. Sums are taken in f64 and agree with the twin's to 1e-13 of the sum of
// magnitudes; argmax_rows is exact. Twins: src/launch/reduce.rs.
#include "access.cuh"
#include "reduction.cuh"

struct SumArguments {
    u64 x;
    u64 out;
    u64 len;
    u64 divisor;
    u32 out_type;
};

template <class C, class T>
__device__ void sum(const SumArguments& g) {
    double total = sum_by_block(Typed<T>(g.x), g.len) / double(g.divisor);
    if (threadIdx.x == 0) store_one(Any(g.out, g.out_type), 0, total);
}

ENTRIES_BY_FLOAT(sum, SumArguments, sum)

struct ArgmaxArguments {
    u64 x;
    u64 out;
    u64 rows;
    u64 columns;
};

template <class C>
struct Largest {
    C value;
    u32 at;

    // Whether this one is taken before `other`: larger, or NaN, or as large and further left.
    __device__ bool beats(const Largest& other) const {
        if (is_nan(value) != is_nan(other.value)) return is_nan(value);
        bool equal = is_nan(value) || value == other.value;
        return equal ? at < other.at : value > other.value;
    }
};

template <class C, class T>
__device__ void argmax_rows(const ArgmaxArguments& g) {
    u32 lane = threadIdx.x % WARP;
    u64 warps = threads_of_grid() / WARP;
    for (u64 row = thread_of_grid() / WARP; row < g.rows; row += warps) {
        const T* x = pointer<const T>(g.x) + row * g.columns;
        Largest<C> best = {widen<C>(x[0]), 0};
        for (u64 column = lane; column < g.columns; column += WARP) {
            Largest<C> next = {widen<C>(x[column]), u32(column)};
            if (next.beats(best)) best = next;
        }
        for (u32 offset = WARP / 2; offset > 0; offset /= 2) {
            Largest<C> other = {__shfl_xor_sync(ALL_LANES, best.value, offset),
                                __shfl_xor_sync(ALL_LANES, best.at, offset)};
            if (other.beats(best)) best = other;
        }
        if (lane == 0) pointer<u32>(g.out)[row] = best.at;
    }
}

ENTRIES_BY_FLOAT(argmax_rows, ArgmaxArguments, argmax_rows)

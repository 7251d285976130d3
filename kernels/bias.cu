// One value for each column of a matrix, and its gradient.
//
//   add_bias  out[r, c] = x[r, c] + bias[c]
//   sum_rows  out[c] = sum over r of x[r, c]
//
// Launch: add_bias in steps of the grid; sum_rows gives 32 columns to a block, whose eight warps share the
// rows. add_bias gives the bits of its twin. sum_rows sums in f64 in another order than its twin: they agree
// to 1e-13 of the sum of magnitudes before the one rounding. Twins: src/launch/bias.rs.
#include "access.cuh"
#include "reduction.cuh"

struct AddBiasArguments {
    u64 x;
    u64 bias;
    u64 out;
    u64 len;
    u64 columns;
    u32 x_type;
    u32 bias_type;
    u32 out_type;
};

template <class C, class A>
__device__ void add_bias(const AddBiasArguments& g) {
    A x(g.x, g.x_type), bias(g.bias, g.bias_type), out(g.out, g.out_type);
    constexpr int PACK = PackOf<A>::value;
    u64 head = aligned_from<PACK>(g.len, x, out);
    walk<PACK>(g.len, head, thread_of_grid(), threads_of_grid(), [&](u64 index, auto count) {
        constexpr int COUNT = decltype(count)::value;
        C values[COUNT];
        x.template load<COUNT>(index, values);
        u64 column = index % g.columns;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            values[i] = values[i] + load_one<C>(bias, column);
            column = column + 1 == g.columns ? 0 : column + 1;
        }
        out.template store<COUNT>(index, values);
    });
}

ENTRIES_BY_TYPES(add_bias, AddBiasArguments, add_bias)

struct SumRowsArguments {
    u64 x;
    u64 out;
    u64 rows;
    u64 columns;
    u32 out_type;
};

template <class C, class T>
__device__ void sum_rows(const SumRowsArguments& g) {
    constexpr u32 WARPS = BLOCK / WARP;
    __shared__ double sums[WARPS][WARP];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const T* x = pointer<const T>(g.x);
    for (u64 first = u64(blockIdx.x) * WARP; first < g.columns; first += u64(gridDim.x) * WARP) {
        u64 column = first + lane;
        double sum = 0;
        for (u64 row = warp; row < g.rows && column < g.columns; row += WARPS) {
            sum += widen<double>(x[row * g.columns + column]);
        }
        sums[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && column < g.columns) {
            double total = 0;
            for (u32 part = 0; part < WARPS; part++) total += sums[part][lane];
            store_one(Any(g.out, g.out_type), column, total);
        }
        __syncthreads();
    }
}

ENTRIES_BY_FLOAT(sum_rows, SumRowsArguments, sum_rows)

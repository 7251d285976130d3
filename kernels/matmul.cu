// Matrix product: out[m, n] = a[m, k] * b[k, n], plus what `out` held if `add` is not 0.
//
// Shapes: `a` and `b` are views with strides in elements, `out` is dense rows. Launch: a block computes a
// tile of 64 by 64 at a time, each of its 256 threads 4 by 4 of it, over slices of 16 along k in shared
// memory. Products are summed in float (double for f64) in the order of k with one rounding a step, and
// rounded once into `out`. The twin, src/launch/matmul.rs, sums in another order.
#include "access.cuh"

constexpr u32 TILE = 64, SLICE = 16, SIDE = 16, OWN = TILE / SIDE;

struct MatmulArguments {
    u64 a;
    u64 b;
    u64 out;
    u64 m;
    u64 k;
    u64 n;
    u64 a_row;
    u64 a_column;
    u64 b_row;
    u64 b_column;
    u32 add;
};

// Rows `first..first + TILE` and columns `at..at + SLICE` of a view with that many rows and columns; 0
// outside.
template <class C, class T>
__device__ void load_slice(C (*slice)[TILE + 1], const T* x, u64 first, u64 rows, u64 row_stride,
                           u64 at, u64 columns, u64 column_stride) {
    // Neighbouring threads take neighbouring memory.
    bool along_columns = column_stride <= row_stride;
    for (u32 item = threadIdx.x; item < TILE * SLICE; item += BLOCK) {
        u32 row = along_columns ? item / SLICE : item % TILE;
        u32 column = along_columns ? item % SLICE : item / TILE;
        bool inside = first + row < rows && at + column < columns;
        slice[column][row] =
            inside ? widen<C>(x[(first + row) * row_stride + (at + column) * column_stride]) : C(0);
    }
}

template <class T, class O>
__device__ void matmul(const MatmulArguments& g) {
    typedef typename ComputeOf<T, T>::type C;
    __shared__ C left[SLICE][TILE + 1], right[SLICE][TILE + 1];
    u32 x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    u64 across = (g.n + TILE - 1) / TILE, tiles = (g.m + TILE - 1) / TILE * across;
    for (u64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        u64 top = tile / across * TILE, side = tile % across * TILE;
        C sums[OWN][OWN] = {};
        for (u64 at = 0; at < g.k; at += SLICE) {
            load_slice(left, pointer<const T>(g.a), top, g.m, g.a_row, at, g.k, g.a_column);
            load_slice(right, pointer<const T>(g.b), side, g.n, g.b_column, at, g.k, g.b_row);
            __syncthreads();
            // Past the end of k both slices are 0, which changes no sum.
#pragma unroll 4
            for (u32 i = 0; i < SLICE; i++) {
#pragma unroll
                for (u32 row = 0; row < OWN; row++) {
#pragma unroll
                    for (u32 column = 0; column < OWN; column++) {
                        sums[row][column] = fma(left[i][y + row * SIDE], right[i][x + column * SIDE],
                                                sums[row][column]);
                    }
                }
            }
            __syncthreads();
        }
        for (u32 row = 0; row < OWN; row++) {
            for (u32 column = 0; column < OWN; column++) {
                u64 r = top + y + row * SIDE, c = side + x + column * SIDE;
                if (r >= g.m || c >= g.n) continue;
                O* out = pointer<O>(g.out) + r * g.n + c;
                C sum = sums[row][column];
                if (g.add) sum = sum + widen<C>(*out);
                *out = Narrow<O>::from(sum);
            }
        }
    }
}

ENTRY(matmul_f16_f16, MatmulArguments) { matmul<f16, f16>(arguments); }
ENTRY(matmul_f16_f32, MatmulArguments) { matmul<f16, float>(arguments); }
ENTRY(matmul_bf16_bf16, MatmulArguments) { matmul<bf16, bf16>(arguments); }
ENTRY(matmul_bf16_f32, MatmulArguments) { matmul<bf16, float>(arguments); }
ENTRY(matmul_f32, MatmulArguments) { matmul<float, float>(arguments); }
ENTRY(matmul_f64, MatmulArguments) { matmul<double, double>(arguments); }

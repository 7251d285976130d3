// The softmax of causal attention, and its gradient.
//
//   causal_softmax           p[r, c] = e^(s*x[r, c] - m) / sum over the row, for c <= r mod columns; else 0
//   causal_softmax_backward  grad_x[r, c] = p * (grad_p[r, c] - sum of p * grad_p over the row) * s
//
// Launch: a warp takes a row at a time. Sums are taken in f64, in another order than the twins': results agree
// to 2 units in the last place of f32, 32 of f64. x and p, and grad_p and grad_x, may be one. Twins:
// src/launch/attention.rs.
#include "access.cuh"
#include "reduction.cuh"
#include "special.cuh"

struct CausalSoftmaxArguments {
    u64 scores;
    u64 probabilities;
    u64 rows;
    u64 columns;
    double scale;
    u32 scores_type;
    u32 probabilities_type;
};

// The larger; where one does not compare, the first.
struct LargerScore {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return b > a ? b : a;
    }
};

template <class C, class A>
__device__ void causal_softmax(const CausalSoftmaxArguments& g) {
    A x(g.scores, g.scores_type), p(g.probabilities, g.probabilities_type);
    u32 lane = threadIdx.x % WARP;
    u64 warps = threads_of_grid() / WARP;
    C scale = C(g.scale);
    for (u64 row = thread_of_grid() / WARP; row < g.rows; row += warps) {
        u64 start = row * g.columns, seen = row % g.columns + 1;
        // Every lane begins with the same element: if that is NaN, so is the largest of each.
        C largest = load_one<C>(x, start) * scale;
        for (u64 column = lane; column < seen; column += WARP) {
            largest = LargerScore{}(largest, load_one<C>(x, start + column) * scale);
        }
        largest = reduce_warp(largest, LargerScore{});
        // The row may be overwritten from here on: every lane has read its first element, and a shuffle orders no
        // memory.
        __syncwarp();
        double sum = 0;
        for (u64 column = lane; column < seen; column += WARP) {
            sum += double(exponential(load_one<C>(x, start + column) * scale - largest));
        }
        C divisor = C(reduce_warp(sum, Plus{}));
        for (u64 column = lane; column < g.columns; column += WARP) {
            C value = C(0);
            if (column < seen) value = exponential(load_one<C>(x, start + column) * scale - largest) / divisor;
            store_one(p, start + column, value);
        }
    }
}

ENTRIES_BY_TYPES(causal_softmax, CausalSoftmaxArguments, causal_softmax)

struct CausalSoftmaxBackwardArguments {
    u64 probabilities;
    u64 grad_probabilities;
    u64 grad_scores;
    u64 rows;
    u64 columns;
    double scale;
    u32 probabilities_type;
    u32 grad_probabilities_type;
    u32 grad_scores_type;
};

template <class C, class A>
__device__ void causal_softmax_backward(const CausalSoftmaxBackwardArguments& g) {
    A p(g.probabilities, g.probabilities_type), grad(g.grad_probabilities, g.grad_probabilities_type);
    A out(g.grad_scores, g.grad_scores_type);
    u32 lane = threadIdx.x % WARP;
    u64 warps = threads_of_grid() / WARP;
    C scale = C(g.scale);
    for (u64 row = thread_of_grid() / WARP; row < g.rows; row += warps) {
        u64 start = row * g.columns, seen = row % g.columns + 1;
        double sum = 0;
        for (u64 column = lane; column < seen; column += WARP) {
            sum += double(load_one<C>(p, start + column)) * double(load_one<C>(grad, start + column));
        }
        C dot = C(reduce_warp(sum, Plus{}));
        for (u64 column = lane; column < g.columns; column += WARP) {
            u64 at = start + column;
            C value = C(0);
            if (column < seen) value = load_one<C>(p, at) * (load_one<C>(grad, at) - dot) * scale;
            store_one(out, at, value);
        }
    }
}

ENTRIES_BY_TYPES(causal_softmax_backward, CausalSoftmaxBackwardArguments, causal_softmax_backward)

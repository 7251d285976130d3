// Softmax and cross entropy in one, row by row.
//
//   forward   p[r, c] = e^(x[r, c] - m) / sum of e^(x[r, .] - m), m the largest of the row
//             loss[r] = -ln p[r, label[r]], in f64; the launcher takes the mean with `sum`
//   backward  grad[r, c] = (p[r, c] - [c = label[r]]) * seed[0] / rows
//
// Rows whose label is `ignore` count for nothing: their loss, p and gradient are 0, whatever their logits are, and
// mean_of_rows takes the mean over the other rows, whose number backward divides by. It is 0 if there are none.
//
// Launch: a warp takes a row at a time; mean_of_rows is one block of 1024 threads. p has the compute type of the logits and may be the logits. The sum
// of a row is taken in f64, in another order than the twin's: p and loss agree to 2 units in the last place
// of f32, 32 of f64. A label that is no column makes its loss and its row of the gradient NaN. Twins:
// src/launch/cross_entropy.rs.
#include "access.cuh"
#include "reduction.cuh"
#include "special.cuh"

struct CrossEntropyArguments {
    u64 logits;
    u64 labels;
    u64 losses;
    u64 probabilities;
    u64 rows;
    u64 columns;
    // No label is ~0.
    u64 ignore;
};

template <class C, class T>
__device__ void cross_entropy(const CrossEntropyArguments& g) {
    u32 lane = threadIdx.x % WARP;
    u64 warps = threads_of_grid() / WARP;
    for (u64 row = thread_of_grid() / WARP; row < g.rows; row += warps) {
        const T* x = pointer<const T>(g.logits) + row * g.columns;
        C* p = pointer<C>(g.probabilities) + row * g.columns;
        u64 label = pointer<const u32>(g.labels)[row];
        if (label == g.ignore) {
            for (u64 column = lane; column < g.columns; column += WARP) p[column] = C(0);
            if (lane == 0) pointer<double>(g.losses)[row] = 0.0;
            continue;
        }
        double chosen = label < g.columns ? widen<double>(x[label]) : double(not_a_number());
        // Every lane begins with the same element: if that is NaN, so is the largest of each.
        C largest = widen<C>(x[0]);
        for (u64 column = lane; column < g.columns; column += WARP) {
            largest = Larger{}(largest, widen<C>(x[column]));
        }
        largest = reduce_warp(largest, Larger{});
        // The row may be overwritten from here on.
        __syncwarp();
        double sum = 0;
        for (u64 column = lane; column < g.columns; column += WARP) {
            C power = exponential(widen<C>(x[column]) - largest);
            p[column] = power;
            sum += double(power);
        }
        sum = reduce_warp(sum, Plus{});
        C divisor = C(sum);
        for (u64 column = lane; column < g.columns; column += WARP) p[column] = p[column] / divisor;
        if (lane == 0) pointer<double>(g.losses)[row] = log(sum) - (chosen - double(largest));
    }
}

ENTRIES_BY_FLOAT(cross_entropy, CrossEntropyArguments, cross_entropy)

struct MeanOfRowsArguments {
    u64 losses;
    u64 labels;
    u64 loss;
    // A double: receives the number of rows that count.
    u64 counted;
    u64 rows;
    u64 ignore;
    u32 loss_type;
};

ENTRY(mean_of_rows, MeanOfRowsArguments) {
    const MeanOfRowsArguments& g = arguments;
    // As in `sum` (reduce.cu): with nothing ignored the mean has the same bits.
    double total = sum_by_block(Typed<double>(g.losses), g.rows);
    u64 counted = 0;
    for (u64 row = threadIdx.x; row < g.rows; row += blockDim.x) {
        if (pointer<const u32>(g.labels)[row] != g.ignore) counted++;
    }
    counted = reduce_block(counted, u64(0), Plus{});
    if (threadIdx.x > 0) return;
    *pointer<double>(g.counted) = double(counted);
    store_one(Any(g.loss, g.loss_type), 0, counted > 0 ? total / double(counted) : 0.0);
}

struct CrossEntropyBackwardArguments {
    u64 probabilities;
    u64 labels;
    u64 seed;
    u64 grad_logits;
    u64 rows;
    u64 columns;
    u64 ignore;
    // A double in place of `rows`, or 0.
    u64 counted;
    u32 probabilities_type;
    u32 grad_logits_type;
};

template <class C, class A>
__device__ void cross_entropy_backward(const CrossEntropyBackwardArguments& g) {
    A p(g.probabilities, g.probabilities_type), grad(g.grad_logits, g.grad_logits_type);
    double rows = g.counted ? *pointer<const double>(g.counted) : double(g.rows);
    C factor = C(double(*pointer<const float>(g.seed)) / rows);
    u64 len = g.rows * g.columns;
    for (u64 index = thread_of_grid(); index < len; index += threads_of_grid()) {
        u64 row = index / g.columns, column = index - row * g.columns;
        u64 label = pointer<const u32>(g.labels)[row];
        if (label == g.ignore) {
            store_one(grad, index, C(0));
            continue;
        }
        C value = load_one<C>(p, index);
        if (label >= g.columns) value = C(not_a_number());
        if (label == column) value = value - C(1);
        store_one(grad, index, value * factor);
    }
}

ENTRIES_BY_TYPES(cross_entropy_backward, CrossEntropyBackwardArguments, cross_entropy_backward)

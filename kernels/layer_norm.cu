// Normalization of rows, and its gradients.
//
//   layer_norm           out = (x - mean) * root * weight + bias; stats = (mean, root) of each row,
//                        root = 1 / sqrt(mean of (x - mean)^2 + epsilon)
//   layer_norm_backward  with n = (x - mean) * root and h = grad_out * weight:
//                        grad_in = root * (h - mean(h) - n * mean(h * n)), grad_normalized = grad_out * n
//
// Launch: a warp takes a row at a time. Sums are taken in f64, in another order than the twins': results agree
// to a few units in the last place of the largest term. out may be x. Twins: src/launch/layer_norm.rs.
#include "access.cuh"
#include "reduction.cuh"

struct LayerNormArguments {
    u64 x;
    u64 weight;
    u64 bias;
    u64 out;
    u64 stats;
    u64 rows;
    u64 columns;
    double epsilon;
    u32 x_type;
    u32 weight_type;
    u32 bias_type;
    u32 out_type;
    u32 stats_type;
};

template <class C, class A>
__device__ void layer_norm(const LayerNormArguments& g) {
    A x(g.x, g.x_type), weight(g.weight, g.weight_type), bias(g.bias, g.bias_type), out(g.out, g.out_type);
    Any stats(g.stats, g.stats_type);
    u32 lane = threadIdx.x % WARP;
    u64 warps = threads_of_grid() / WARP;
    for (u64 row = thread_of_grid() / WARP; row < g.rows; row += warps) {
        u64 start = row * g.columns;
        double sum = 0;
        for (u64 column = lane; column < g.columns; column += WARP) sum += double(load_one<C>(x, start + column));
        double center = reduce_warp(sum, Plus{}) / double(g.columns);
        sum = 0;
        for (u64 column = lane; column < g.columns; column += WARP) {
            double off = double(load_one<C>(x, start + column)) - center;
            sum += off * off;
        }
        double variance = reduce_warp(sum, Plus{}) / double(g.columns);
        C mean = C(center), root = C(1.0 / sqrt(variance + g.epsilon));
        for (u64 column = lane; column < g.columns; column += WARP) {
            C value = (load_one<C>(x, start + column) - mean) * root;
            store_one(out, start + column, value * load_one<C>(weight, column) + load_one<C>(bias, column));
        }
        if (lane == 0) {
            store_one(stats, 2 * row, mean);
            store_one(stats, 2 * row + 1, root);
        }
    }
}

ENTRIES_BY_TYPES(layer_norm, LayerNormArguments, layer_norm)

struct LayerNormBackwardArguments {
    u64 x;
    u64 weight;
    u64 grad_out;
    u64 grad_in;
    u64 grad_normalized;
    u64 stats;
    u64 rows;
    u64 columns;
    u32 x_type;
    u32 weight_type;
    u32 grad_out_type;
    u32 grad_in_type;
    u32 grad_normalized_type;
    u32 stats_type;
};

template <class C, class A>
__device__ void layer_norm_backward(const LayerNormBackwardArguments& g) {
    A x(g.x, g.x_type), weight(g.weight, g.weight_type), grad_out(g.grad_out, g.grad_out_type);
    A grad_in(g.grad_in, g.grad_in_type), grad_normalized(g.grad_normalized, g.grad_normalized_type);
    Any stats(g.stats, g.stats_type);
    u32 lane = threadIdx.x % WARP;
    u64 warps = threads_of_grid() / WARP;
    for (u64 row = thread_of_grid() / WARP; row < g.rows; row += warps) {
        u64 start = row * g.columns;
        C mean = load_one<C>(stats, 2 * row), root = load_one<C>(stats, 2 * row + 1);
        double sum = 0, product = 0;
        for (u64 column = lane; column < g.columns; column += WARP) {
            double h = double(load_one<C>(grad_out, start + column)) * double(load_one<C>(weight, column));
            sum += h;
            product += h * double((load_one<C>(x, start + column) - mean) * root);
        }
        C first = C(reduce_warp(sum, Plus{}) / double(g.columns));
        C second = C(reduce_warp(product, Plus{}) / double(g.columns));
        for (u64 column = lane; column < g.columns; column += WARP) {
            C normalized = (load_one<C>(x, start + column) - mean) * root;
            C grad = load_one<C>(grad_out, start + column);
            C value = grad * load_one<C>(weight, column) - first - normalized * second;
            store_one(grad_in, start + column, root * value);
            store_one(grad_normalized, start + column, grad * normalized);
        }
    }
}

ENTRIES_BY_TYPES(layer_norm_backward, LayerNormBackwardArguments, layer_norm_backward)

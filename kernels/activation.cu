// Activation functions and their gradients.
//
//   relu           out = max(x, 0)
//   gelu           out = x * Phi(x)
//   relu_backward  grad_in = grad_out where x > 0, else 0
//   gelu_backward  grad_in = grad_out * (Phi(x) + x * phi(x))
//
// Shapes: all operands of one length; the output may be an input. Launch: steps of the grid. NaN passes, and
// lets the gradient pass. Same bits as the twins, src/launch/activation.rs, but for gelu in f64, where the
// exponential is the device's own (within 2 units in the last place).
#include "access.cuh"
#include "special.cuh"

struct UnaryArguments {
    u64 x;
    u64 out;
    u64 len;
    u32 x_type;
    u32 out_type;
};

template <class C, class A>
__device__ void relu(const UnaryArguments& g) {
    map<C>(A(g.x, g.x_type), A(g.out, g.out_type), g.len,
           [](C x) { return x <= C(0) ? C(0) : x; });
}

template <class C, class A>
__device__ void gelu(const UnaryArguments& g) {
    map<C>(A(g.x, g.x_type), A(g.out, g.out_type), g.len, [](C x) { return x * normal_cdf(x); });
}

ENTRIES_BY_TYPES(relu, UnaryArguments, relu)
ENTRIES_BY_TYPES(gelu, UnaryArguments, gelu)

struct ActivationBackwardArguments {
    u64 x;
    u64 grad_out;
    u64 grad_in;
    u64 len;
    u32 x_type;
    u32 grad_out_type;
    u32 grad_in_type;
};

template <class C, class A, class F>
__device__ void backward(const ActivationBackwardArguments& g, F f) {
    map2<C>(A(g.x, g.x_type), A(g.grad_out, g.grad_out_type), A(g.grad_in, g.grad_in_type), g.len, f);
}

template <class C, class A>
__device__ void relu_backward(const ActivationBackwardArguments& g) {
    backward<C, A>(g, [](C x, C grad) { return x <= C(0) ? C(0) : grad; });
}

template <class C, class A>
__device__ void gelu_backward(const ActivationBackwardArguments& g) {
    backward<C, A>(g, [](C x, C grad) {
        // 1 / sqrt(2 pi)
        C density = exponential(x * x * C(-0.5)) * C(0.39894228040143267794);
        return grad * (normal_cdf(x) + x * density);
    });
}

ENTRIES_BY_TYPES(relu_backward, ActivationBackwardArguments, relu_backward)
ENTRIES_BY_TYPES(gelu_backward, ActivationBackwardArguments, gelu_backward)

// Arithmetic element by element.
//
//   add         out[i] = a[i] + b[i]
//   mul         out[i] = a[i] * b[i]
//   scale       out[i] = x[i] * factor[0]
//   add_scaled  out[i] = out[i] + factor * x[i]
//
// Shapes: all operands of one length; `out` may be an input. Launch: steps of the grid. Computed in float
// (double as soon as an operand is f64; for `scale` also when the output has 16 bits) and rounded once. Same
// bits as the twins, src/launch/elementwise.rs.
#include "access.cuh"

struct BinaryArguments {
    u64 a;
    u64 b;
    u64 out;
    u64 len;
    u32 a_type;
    u32 b_type;
    u32 out_type;
};

template <class C, class A>
__device__ void add(const BinaryArguments& g) {
    auto sum = [](C a, C b) { return a + b; };
    // The usual mixture, in packs: gradients of 16 bits are added up in float.
    bool is_any = A::SIZE == 16, is_wide = is_any && g.a_type == F32 && g.out_type == F32;
    Typed<float> a(g.a), out(g.out);
    if (is_wide && g.b_type == F16) map2<C>(a, Typed<f16>(g.b), out, g.len, sum);
    else if (is_wide && g.b_type == BF16) map2<C>(a, Typed<bf16>(g.b), out, g.len, sum);
    else map2<C>(A(g.a, g.a_type), A(g.b, g.b_type), A(g.out, g.out_type), g.len, sum);
}

template <class C, class A>
__device__ void mul(const BinaryArguments& g) {
    map2<C>(A(g.a, g.a_type), A(g.b, g.b_type), A(g.out, g.out_type), g.len,
            [](C a, C b) { return a * b; });
}

ENTRIES_BY_TYPES(add, BinaryArguments, add)
ENTRIES_BY_TYPES(mul, BinaryArguments, mul)

struct ScaleArguments {
    u64 x;
    u64 factor;
    u64 out;
    u64 len;
    u32 factor_type;
};

template <class C, class X, class O>
__device__ void scale_in(const ScaleArguments& g) {
    C factor = load_one<C>(Any(g.factor, g.factor_type), 0);
    map<C>(Typed<X>(g.x), Typed<O>(g.out), g.len, [=](C x) { return x * factor; });
}

template <class X, class O>
__device__ void scale(const ScaleArguments& g) {
    if (sizeof(O) == 2 || g.factor_type == F64) {
        scale_in<double, X, O>(g);
    } else {
        scale_in<typename ComputeOf<X, O>::type, X, O>(g);
    }
}

ENTRIES_BY_PAIR(scale, ScaleArguments, scale)

struct AddScaledArguments {
    u64 x;
    u64 out;
    u64 len;
    double factor;
    u32 x_type;
    u32 out_type;
};

template <class C, class A>
__device__ void add_scaled(const AddScaledArguments& g) {
    C factor = C(g.factor);
    A out(g.out, g.out_type);
    map2<C>(A(g.x, g.x_type), out, out, g.len, [=](C x, C y) { return y + factor * x; });
}

ENTRIES_BY_TYPES(add_scaled, AddScaledArguments, add_scaled)

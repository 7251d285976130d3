// Scaled conversion to and from 8 bits.
//
//   amax        amax[0] = max(amax[0], |x[i]|); NaN counts as largest
//   quantize    y[i] = x[i] * scale, rounded; beside it amax as above, 1 / scale, and counts of what was lost
//   dequantize  y[i] = x[i] * inverse, rounded
//
// Shapes: any length. Products are taken in float, double where the wide side is double, rounded there and
// once more to the result's type. amax and counts go on from what they hold: they are added to by atomic
// operations whose order does not matter, as amax is a maximum of bits and the counts are whole numbers.
// Launch: steps of the grid. Same bits as the twins, src/launch/quantize.rs, but for the payload of NaN.
#include "access.cuh"
#include "reduction.cuh"

// Counts of a tensor, f64: places as in src/launch/quantize.rs.
constexpr u32 ELEMENTS = 0, OVERFLOWED = 1, VANISHED = 2, NAN_ELEMENTS = 3;

// |value| as bits, whose order is that of the numbers, infinity and NaN above.
template <class C>
__device__ inline u32 magnitude_bits(C value) {
    return bits_of(float(value)) & 0x7fffffffu;
}

// Takes the block's largest into `amax`, if there is one to take it into. By all threads of the block.
__device__ inline void take_amax(u64 amax, u32 own) {
    u32 largest = reduce_block(own, 0u, Larger{});
    if (threadIdx.x == 0 && amax) atomicMax(pointer<u32>(amax), largest);
}

struct AmaxArguments {
    u64 x;
    u64 amax;
    u64 len;
};

template <class C, class T>
__device__ void amax(const AmaxArguments& g) {
    Typed<T> x(g.x);
    constexpr int PACK = PackOf<Typed<T>>::value;
    u64 head = aligned_from<PACK>(g.len, x);
    u32 largest = 0;
    walk<PACK>(g.len, head, thread_of_grid(), threads_of_grid(), [&](u64 index, auto count) {
        constexpr int COUNT = decltype(count)::value;
        C values[COUNT];
        x.template load<COUNT>(index, values);
#pragma unroll
        for (int i = 0; i < COUNT; i++) largest = Larger{}(largest, magnitude_bits(values[i]));
    });
    take_amax(g.amax, largest);
}

ENTRIES_BY_FLOAT(amax, AmaxArguments, amax)

struct QuantizeArguments {
    u64 x;
    u64 y;
    u64 len;
    u64 scale;
    // 0 where they are not asked for.
    u64 inverse;
    u64 amax;
    u64 counts;
    u32 saturate;
};

struct Found {
    u32 amax = 0;
    u64 overflowed = 0;
    u64 vanished = 0;
    u64 nan = 0;
};

template <class C, class F>
__device__ inline F quantized(C x, C scale, bool saturate, Found& found) {
    F y = Narrow<F>::from(x * scale);
    bool is_number = !is_nan(x * scale);
    bool overflowed = is_number && (y.bits & 0x7f) == F::OVERFLOW;
    found.amax = Larger{}(found.amax, magnitude_bits(x));
    found.overflowed += overflowed;
    found.vanished += (y.bits & 0x7f) == 0 && x != C(0);
    found.nan += !is_number;
    // The largest number is one below.
    if (saturate && overflowed) y.bits -= 1;
    return y;
}

template <class S, class F>
__device__ void quantize(const QuantizeArguments& g) {
    typedef typename ComputeOf<S, F>::type C;
    Typed<S> x(g.x);
    Typed<F> y(g.y);
    constexpr int PACK = PackOf<Typed<S>, Typed<F>>::value;
    u64 head = aligned_from<PACK>(g.len, x, y);
    float scale = *pointer<const float>(g.scale);
    Found found;
    walk<PACK>(g.len, head, thread_of_grid(), threads_of_grid(), [&](u64 index, auto count) {
        constexpr int COUNT = decltype(count)::value;
        C values[COUNT];
        x.template load<COUNT>(index, values);
        Pack<F, COUNT> codes;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            codes.at[i] = quantized<C, F>(values[i], C(scale), g.saturate != 0, found);
        }
        *reinterpret_cast<Pack<F, COUNT>*>(y.at + index) = codes;
    });
    take_amax(g.amax, found.amax);
    u64 overflowed = reduce_block(found.overflowed, u64(0), Plus{});
    u64 vanished = reduce_block(found.vanished, u64(0), Plus{});
    u64 nan = reduce_block(found.nan, u64(0), Plus{});
    if (threadIdx.x == 0 && g.counts) {
        double* counts = pointer<double>(g.counts);
        if (overflowed) atomicAdd(counts + OVERFLOWED, double(overflowed));
        if (vanished) atomicAdd(counts + VANISHED, double(vanished));
        if (nan) atomicAdd(counts + NAN_ELEMENTS, double(nan));
    }
    if (thread_of_grid() > 0) return;
    if (g.counts) atomicAdd(pointer<double>(g.counts) + ELEMENTS, double(g.len));
    if (g.inverse) *pointer<float>(g.inverse) = float(1.0 / double(scale));
}

ENTRIES_TO_F8(quantize, QuantizeArguments, quantize)

struct DequantizeArguments {
    u64 x;
    u64 y;
    u64 len;
    u64 inverse;
};

template <class F, class D>
__device__ void dequantize(const DequantizeArguments& g) {
    typedef typename ComputeOf<F, D>::type C;
    C inverse = C(*pointer<const float>(g.inverse));
    map<C>(Typed<F>(g.x), Typed<D>(g.y), g.len, [=](C value) { return value * inverse; });
}

ENTRIES_FROM_F8(dequantize, DequantizeArguments, dequantize)

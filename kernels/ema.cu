// Exponential moving averages of weights, over any number of tensors.
//
//   if found_inf != 0: nothing is written
//   for each element:  average = average - share * (average - weight)
//
// Columns of the table: average, a float or double; weight, of any float type; and, where the weight is the upper half of
// its master, the lower half (split_master.cuh). Computed in the type of the average. Launch: a block takes a chunk of
// the table at a time. Same bits as the twin, src/launch/ema.rs.
#include "chunk_table.cuh"
#include "split_master.cuh"

constexpr u32 AVERAGE = 0, WEIGHT = 1, REMAINDER = 2;

// Addresses; the flag's is 0 where absent.
struct EmaArguments {
    Table table;
    u64 found_inf;
    u64 share;
};

// `parts` are operands whose alignment is that of `w`.
template <class C, class W, class... Parts>
__device__ inline void approach(const Chunk& chunk, C share, const W& w, const Parts&... parts) {
    Typed<C> a(chunk.address(AVERAGE));
    constexpr int PACK = PackOf<Typed<C>, W>::value;
    u64 head = aligned_from<PACK>(chunk.len(), a, parts...);
    walk<PACK>(chunk.len(), head, threadIdx.x, blockDim.x, [&](u64 at, auto count) {
        constexpr int COUNT = decltype(count)::value;
        C averages[COUNT], weights[COUNT];
        a.template load<COUNT>(at, averages);
        w.template load<COUNT>(at, weights);
#pragma unroll
        for (int i = 0; i < COUNT; i++) averages[i] = averages[i] - share * (averages[i] - weights[i]);
        a.template store<COUNT>(at, averages);
    });
}

ENTRY(ema, EmaArguments) {
    // NaN is not equal to 0 either.
    if (arguments.found_inf && *pointer<const float>(arguments.found_inf) != 0.0f) return;
    double share = *pointer<const double>(arguments.share);
    for (u64 index = blockIdx.x; index < arguments.table.chunks; index += gridDim.x) {
        Chunk chunk(arguments.table, index);
        u64 w = chunk.address(WEIGHT), remainder = chunk.address(REMAINDER);
        if (remainder) {
            approach(chunk, float(share), Split<2>(w, remainder), Typed<bf16>(w), Typed<bf16>(remainder));
        } else if (chunk.type(AVERAGE) == F64) {
            approach(chunk, share, Typed<double>(w), Typed<double>(w));
        } else {
            with_float(chunk.type(WEIGHT), [&](auto type) {
                Typed<typename decltype(type)::type> weight(w);
                approach(chunk, float(share), weight, weight);
            });
        }
    }
}

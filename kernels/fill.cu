// One value for every element: `dst[i] = value`, rounded once (u32 truncates and saturates).
//
// Shapes: any length. Launch: steps of the grid. Same bits as the twin, src/launch/fill.rs.
#include "access.cuh"

struct FillArguments {
    u64 dst;
    u64 len;
    double value;
};

template <class T>
__device__ void fill(const FillArguments& g) {
    Typed<T> dst(g.dst);
    constexpr int PACK = PackOf<Typed<T>>::value;
    u64 head = aligned_from<PACK>(g.len, dst);
    Pack<T, PACK> pack;
#pragma unroll
    for (int i = 0; i < PACK; i++) pack.at[i] = Narrow<T>::from(g.value);
    walk<PACK>(g.len, head, thread_of_grid(), threads_of_grid(), [&](u64 index, auto count) {
        constexpr int COUNT = decltype(count)::value;
        if constexpr (COUNT == 1) dst.at[index] = pack.at[0];
        else *reinterpret_cast<Pack<T, COUNT>*>(dst.at + index) = pack;
    });
}

ENTRY(fill_f16, FillArguments) { fill<f16>(arguments); }
ENTRY(fill_bf16, FillArguments) { fill<bf16>(arguments); }
ENTRY(fill_f32, FillArguments) { fill<float>(arguments); }
ENTRY(fill_f64, FillArguments) { fill<double>(arguments); }
ENTRY(fill_f8e4m3, FillArguments) { fill<f8e4m3>(arguments); }
ENTRY(fill_f8e5m2, FillArguments) { fill<f8e5m2>(arguments); }
ENTRY(fill_u32, FillArguments) { fill<u32>(arguments); }

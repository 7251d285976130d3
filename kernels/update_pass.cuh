// What every optimizer kernel does around its formula: skip, unscale, clip, master weights.
//
//   if found_inf != 0: nothing is written
//   for each element:  w = master, or the parameter;  g = gradient * inv_scale * clip
//                      (w, state) = rule(w, g, state)
//                      master = w;  parameter = w rounded once
//
// Columns of the table: parameter, gradient, master weight (float), then state in the compute type. A block
// takes a chunk at a time. The usual types go in packs, other mixtures element by element.
#pragma once
#include "chunk_table.cuh"

constexpr u32 PARAMETER = 0, GRADIENT = 1, MASTER = 2, STATE = 3;

// Addresses of floats, 0 where absent.
struct StepScalars {
    u64 found_inf;
    u64 inv_scale;
    u64 clip;
};

__device__ inline bool is_skipped(const StepScalars& scalars) {
    // NaN is not equal to 0 either.
    return scalars.found_inf && *pointer<const float>(scalars.found_inf) != 0.0f;
}

__device__ inline float scalar_or_one(u64 address) {
    return address ? *pointer<const float>(address) : 1.0f;
}

// Applies `rule` to the weights `w` of one chunk, which are the parameters `p` themselves or masters of them.
// `FIRST` and `SECOND` say which states the rule has.
template <class C, bool FIRST, bool SECOND, class P, class G, class W, class Rule>
__device__ inline void update_in(const Chunk& chunk, P p, G g, W w, const StepScalars& scalars,
                                 const Rule& rule) {
    Typed<C> first(chunk.address(STATE)), second(SECOND ? chunk.address(STATE + 1) : 0);
    C inv_scale = C(scalar_or_one(scalars.inv_scale)), clip = C(scalar_or_one(scalars.clip));
    bool has_master = w.address() != p.address();
    constexpr int PACK = PackOf<P, G, W>::value;
    u64 len = chunk.len();
    u64 head = aligned_from<PACK>(len, p, g, w, FIRST ? first : Typed<C>(0), second);
    walk<PACK>(len, head, threadIdx.x, blockDim.x, [&](u64 at, auto count) {
        constexpr int COUNT = decltype(count)::value;
        C weights[COUNT], gradients[COUNT], firsts[COUNT], seconds[COUNT];
        w.template load<COUNT>(at, weights);
        g.template load<COUNT>(at, gradients);
        if (FIRST) first.template load<COUNT>(at, firsts);
        if (SECOND) second.template load<COUNT>(at, seconds);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            rule.apply(weights[i], gradients[i] * inv_scale * clip, firsts[i], seconds[i]);
        }
        if (FIRST) first.template store<COUNT>(at, firsts);
        if (SECOND) second.template store<COUNT>(at, seconds);
        if (has_master) w.template store<COUNT>(at, weights);
        p.template store<COUNT>(at, weights);
    });
}

// As above, for whatever types the chunk has; `make_rule(C)` gives the rule in the compute type.
template <bool FIRST, bool SECOND, class MakeRule>
__device__ inline void update_chunk(const Chunk& chunk, const StepScalars& scalars, MakeRule make_rule) {
    u64 p = chunk.address(PARAMETER), g = chunk.address(GRADIENT), m = chunk.address(MASTER);
    u32 p_type = chunk.type(PARAMETER), g_type = chunk.type(GRADIENT);
    bool same = p_type == g_type;
    auto run = [&](auto compute, auto parameter, auto gradient, auto weight) {
        typedef decltype(compute) C;
        update_in<C, FIRST, SECOND>(chunk, parameter, gradient, weight, scalars, make_rule(compute));
    };
    if (same && p_type == F32 && !m) {
        run(float(), Typed<float>(p), Typed<float>(g), Typed<float>(p));
    } else if (same && p_type == F16 && m) {
        run(float(), Typed<f16>(p), Typed<f16>(g), Typed<float>(m));
    } else if (same && p_type == BF16 && m) {
        run(float(), Typed<bf16>(p), Typed<bf16>(g), Typed<float>(m));
    } else if (p_type == F64) {
        run(double(), Any(p, p_type), Any(g, g_type), Any(p, p_type));
    } else {
        Any weight(m ? m : p, m ? chunk.type(MASTER) : p_type);
        run(float(), Any(p, p_type), Any(g, g_type), weight);
    }
}

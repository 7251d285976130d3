// What every optimizer kernel does around its formula: skip, unscale, clip, masters, rounding of state.
//
//   if found_inf != 0: nothing is written
//   for each element:  w = master, or the parameter;  g = gradient * inv_scale * clip
//                      (w, state) = rule(w, g, state)
//                      master = w;  parameter = w rounded once
//                      if the parameter was finite and is not any more, `found` counts it
//
// Columns of the table: parameter, gradient, master, then state. A block takes a chunk at a time. The usual types
// go in packs, other mixtures element by element.
//
// A master is a float, or, if its type has 16 bits, the lower half of one whose upper half is the parameter, a
// bf16 (split_master.cuh). State is of the compute type or bf16, then rounded by chance (stochastic.cuh).
// Twin: src/launch/update_pass.rs.
#pragma once
#include "chunk_table.cuh"
#include "split_master.cuh"
#include "stochastic.cuh"

constexpr u32 PARAMETER = 0, GRADIENT = 1, MASTER = 2, STATE = 3;

// Addresses, 0 where absent: of floats, but for `clip`, which has the type `clip_type`, float or double.
struct StepScalars {
    u64 found_inf;
    u64 inv_scale;
    u64 clip;
    u64 clip_type;
};

__device__ inline bool is_skipped(const StepScalars& scalars) {
    // NaN is not equal to 0 either.
    return scalars.found_inf && *pointer<const float>(scalars.found_inf) != 0.0f;
}

__device__ inline float scalar_or_one(u64 address) {
    return address ? *pointer<const float>(address) : 1.0f;
}

template <class C>
__device__ inline C clip_of(const StepScalars& scalars) {
    if (scalars.clip && scalars.clip_type == F64) return C(*pointer<const double>(scalars.clip));
    return C(scalar_or_one(scalars.clip));
}

// Settings of groups of tensors, a row of doubles each, and the group of every tensor.
constexpr u32 SETTING_WORDS = 8;
struct GroupSettings {
    u64 rows;
    u64 groups;
};

__device__ inline const double* settings_of(const GroupSettings& settings, u64 tensor) {
    return pointer<const double>(settings.rows) + SETTING_WORDS * pointer<const u32>(settings.groups)[tensor];
}

// Words of `found`: elements of all tensors that were lost, and for each tensor those that became infinite, those that
// became NaN, and the complement of the place of the first.
constexpr u32 FOUND_HEAD = 1, FOUND_WORDS = 3;

// From this magnitude on, weights are infinite in their type.
template <class C>
__device__ inline C infinite_from(u32 type) {
    return type == F16 ? C(65520.0f) : C(float_of(type == BF16 ? 0x7f7f8000u : 0x7f800000u));
}

// Counts the elements of a pack that are about to become infinite or NaN; `first` is the number of element 0.
template <int COUNT, class C, class W>
__device__ inline void note_lost(u64* found, u64 tensor, u64 first, const W& w, u64 at, const C* weights, C infinite) {
    C before[COUNT];
    w.template load<COUNT>(at, before);
    u64 inf = 0, nan = 0, place = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (fabs(weights[i]) < infinite || !(fabs(before[i]) < infinite)) continue;
        if (is_nan(weights[i])) nan++;
        else inf++;
        if (place == 0) place = ~(first + at + i);
    }
    if (inf + nan == 0) return;
    u64* of = found + FOUND_HEAD + FOUND_WORDS * tensor;
    atomicAdd(found, inf + nan);
    atomicAdd(of, inf);
    atomicAdd(of + 1, nan);
    atomicMax(of + 2, place);
}

template <int COUNT, class C, class P, class W>
__device__ inline void store_weights(const P& p, const W& w, u64 at, const C* weights) {
    if (w.address() != p.address()) w.template store<COUNT>(at, weights);
    p.template store<COUNT>(at, weights);
}
template <int COUNT, class P, u32 ELEMENT>
__device__ inline void store_weights(const P&, const Split<ELEMENT>& w, u64 at, const float* weights) {
    w.template store<COUNT>(at, weights);
}

// The states of a chunk, which are all of one type; the last may be absent.
template <int COUNT, class S>
struct States {
    static constexpr int ROOM = COUNT > 0 ? COUNT : 1;
    static constexpr bool BY_CHANCE = sizeof(S) == 2;
    u64 at[ROOM];

    __device__ explicit States(const Chunk& chunk) {
        for (int state = 0; state < COUNT; state++) at[state] = chunk.address(STATE + state);
    }

    template <int PACK, class C>
    __device__ void load(u64 index, C (&into)[ROOM][PACK]) const {
#pragma unroll
        for (int state = 0; state < COUNT; state++) {
            if (at[state]) Typed<S>(at[state]).template load<PACK>(index, into[state]);
        }
    }

    // `first` is the number of element 0 in its tensor.
    template <int PACK, class C>
    __device__ void store(u64 index, const C (&values)[ROOM][PACK], u64 key, u64 first) const {
        if constexpr (BY_CHANCE) {
            Pack<S, PACK> packs[ROOM];
#pragma unroll
            for (int i = 0; i < PACK; i++) {
                Chances chances(key, first + index + i);
#pragma unroll
                for (int state = 0; state < COUNT; state++) {
                    packs[state].at[i] = round_by_chance(values[state][i], chances.of(state));
                }
            }
#pragma unroll
            for (int state = 0; state < COUNT; state++) {
                if (!at[state]) continue;
                NOTE_WRITTEN(sizeof(S) * PACK);
                *reinterpret_cast<Pack<S, PACK>*>(pointer<S>(at[state]) + index) = packs[state];
            }
        } else {
#pragma unroll
            for (int state = 0; state < COUNT; state++) {
                if (at[state]) Typed<S>(at[state]).template store<PACK>(index, values[state]);
            }
        }
    }
};

template <int PACK, int COUNT, class S>
__device__ inline bool is_aligned(u64 index, const States<COUNT, S>& states) {
    bool aligned = true;
    for (int state = 0; state < COUNT; state++) {
        aligned = aligned && (!states.at[state] || is_aligned<PACK>(index, Typed<S>(states.at[state])));
    }
    return aligned;
}

// Applies `rule` to the weights `w` of one chunk, which are the parameters `p` themselves or masters of them.
template <class C, class P, class G, class W, int COUNT, class S, class Rule>
__device__ inline void update_in(const Chunk& chunk, P p, G g, W w, const States<COUNT, S>& states,
                                 const StepScalars& scalars, u64 key, u64* found, const Rule& rule) {
    constexpr int ROOM = States<COUNT, S>::ROOM;
    C inv_scale = C(scalar_or_one(scalars.inv_scale)), clip = clip_of<C>(scalars);
    constexpr int PACK = PackOf<P, G, W>::value;
    C infinite = infinite_from<C>(chunk.type(PARAMETER));
    u64 len = chunk.len();
    u64 head = aligned_from<PACK>(len, p, g, w, states);
    walk<PACK>(len, head, threadIdx.x, blockDim.x, [&](u64 at, auto count) {
        constexpr int N = decltype(count)::value;
        C weights[N], gradients[N], kept[ROOM][N] = {};
        w.template load<N>(at, weights);
        g.template load<N>(at, gradients);
        states.load(at, kept);
#pragma unroll
        for (int i = 0; i < N; i++) {
            C state[ROOM];
#pragma unroll
            for (int which = 0; which < ROOM; which++) state[which] = kept[which][i];
            rule.apply(weights[i], gradients[i] * inv_scale * clip, state);
#pragma unroll
            for (int which = 0; which < ROOM; which++) kept[which][i] = state[which];
        }
        states.store(at, kept, key, chunk.offset());
        bool lost = false;
#pragma unroll
        for (int i = 0; i < N; i++) lost |= !(fabs(weights[i]) < infinite);
        if (lost) note_lost<N>(found, chunk.tensor(), chunk.offset(), w, at, weights, infinite);
        store_weights<N>(p, w, at, weights);
    });
}

// As above, for whatever types the chunk has; `make_rule(C)` gives the rule in the compute type. Rules have `COUNT`
// states; in bf16 they may be only if `BY_CHANCE`. Inlined, as what `make_rule` captures would lie in memory otherwise.
template <int COUNT, bool BY_CHANCE, class MakeRule>
__device__ __forceinline__ void update_chunk(const Chunk& chunk, const StepScalars& scalars, u64 key, u64 found,
                                    MakeRule make_rule) {
    u64 p = chunk.address(PARAMETER), g = chunk.address(GRADIENT), m = chunk.address(MASTER);
    u32 p_type = chunk.type(PARAMETER), g_type = chunk.type(GRADIENT), m_type = chunk.type(MASTER);
    auto run = [&](auto compute, auto parameter, auto gradient, auto weight) {
        typedef decltype(compute) C;
        auto with_states = [&](auto type) {
            States<COUNT, typename decltype(type)::type> states(chunk);
            update_in<C>(chunk, parameter, gradient, weight, states, scalars, key, pointer<u64>(found),
                         make_rule(compute));
        };
        if constexpr (BY_CHANCE && sizeof(C) == sizeof(float)) {
            if (chunk.type(STATE) == BF16) return with_states(As<bf16>{});
        }
        with_states(As<C>{});
    };
    // A 16-bit parameter and its master, with gradients of the same type or in float.
    auto run_half = [&](auto parameter, auto master) {
        if (g_type == F32) run(float(), parameter, Typed<float>(g), master);
        else run(float(), parameter, decltype(parameter)(g), master);
    };
    bool usual = g_type == p_type || g_type == F32, wide = m && m_type == F32, cut = m && !wide;
    if (p_type == F64) {
        run(double(), Any(p, p_type), Any(g, g_type), Any(p, p_type));
    } else if (p_type == F32 && g_type == F32 && !m) {
        run(float(), Typed<float>(p), Typed<float>(g), Typed<float>(p));
    } else if (p_type == F16 && usual && wide) {
        run_half(Typed<f16>(p), Typed<float>(m));
    } else if (p_type == BF16 && usual && wide) {
        run_half(Typed<bf16>(p), Typed<float>(m));
    } else if (p_type == BF16 && usual && cut) {
        run_half(Typed<bf16>(p), Split<2>(p, m));
    } else if (cut) {
        run(float(), Any(p, p_type), Any(g, g_type), Split<16>(p, m));
    } else {
        Any weight(m ? m : p, m ? m_type : p_type);
        run(float(), Any(p, p_type), Any(g, g_type), weight);
    }
}

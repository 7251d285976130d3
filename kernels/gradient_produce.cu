// Gradients that are checked where they are made: a sum, or a conversion, with what gradient_check would find.
//
//   sum[i] = term[i], or sum[i] + term[i], rounded once
//   r      = sum * inv_scale, in float (double for f64 sums), of what was rounded
//   a Partial of r for each chunk of `sum`
//
// Terms are of the sum's type, or f16 or bf16 for a sum in f32.
// gradient_gather adds the partials of each tensor up. Launch: gradient_produce gives a block a chunk at a time,
// gradient_gather a warp a tensor. The threads take elements of `sum` in the order of gradient_check, so findings
// are the same bits. Twins: src/launch/gradient_produce.rs.
#include "findings.cuh"

struct ProduceArguments {
    u64 term;
    u64 sum;
    u64 len;
    // Elements of a chunk.
    u64 chunk;
    u64 inv_scale;
    // SCRATCH_WORDS for each chunk.
    u64 partials;
    u32 term_type;
    u32 sum_type;
    u32 add;
};

// Elements of `operand`, a pack at once if there is one.
template <int COUNT, class C, class A>
__device__ inline void load_aligned_or_not(const A& operand, u64 index, bool is_pack, C* into) {
    if (is_pack) {
        operand.template load<COUNT>(index, into);
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) operand.template load<1>(index + i, into + i);
}

template <class T, class S>
__device__ Partial produce_chunk(const ProduceArguments& g, S term, Typed<T> sum, u64 offset, u64 len,
                                 float inv_scale) {
    typedef typename ComputeOf<T, T>::type C;
    C inv = C(inv_scale);
    bool multiply = inv != C(1);
    constexpr int PACK = PackOf<Typed<T>>::value;
    u64 head = aligned_from<PACK>(len, sum);
    bool is_pack = is_aligned<PACK>(head, term);
    Partial own;
    walk<PACK>(len, head, threadIdx.x, blockDim.x, [&](u64 index, auto count) {
        constexpr int COUNT = decltype(count)::value;
        C values[COUNT], old[COUNT];
        load_aligned_or_not<COUNT>(term, index, is_pack, values);
        if (g.add) {
            sum.template load<COUNT>(index, old);
#pragma unroll
            for (int i = 0; i < COUNT; i++) values[i] = old[i] + values[i];
        }
        sum.template store<COUNT>(index, values);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            // What was rounded is what counts.
            values[i] = widen<C>(Narrow<T>::from(values[i]));
            if (multiply) values[i] = values[i] * inv;
        }
        own.take<COUNT>(values, offset + index, L2);
    });
    return over_block(own, L2);
}

template <class T, class S>
__device__ inline void produce_from(const ProduceArguments& g, u64 index, float inv_scale) {
    u64 offset = index * g.chunk, left = g.len - offset, len = left < g.chunk ? left : g.chunk;
    Partial partial = produce_chunk(g, Typed<S>(g.term + offset * sizeof(S)),
                                    Typed<T>(g.sum + offset * sizeof(T)), offset, len, inv_scale);
    if (threadIdx.x == 0) partial.write(pointer<u64>(g.partials) + index * SCRATCH_WORDS);
}

ENTRY(gradient_produce, ProduceArguments) {
    const ProduceArguments& g = arguments;
    float inv_scale = g.inv_scale ? *pointer<const float>(g.inv_scale) : 1.0f;
    u64 chunks = (g.len + g.chunk - 1) / g.chunk;
    for (u64 index = blockIdx.x; index < chunks; index += gridDim.x) {
        if (g.term_type == g.sum_type) {
            with_float(g.sum_type, [&](auto type) {
                typedef typename decltype(type)::type T;
                produce_from<T, T>(g, index, inv_scale);
            });
        } else if (g.term_type == F16) {
            produce_from<float, f16>(g, index, inv_scale);
        } else {
            produce_from<float, bf16>(g, index, inv_scale);
        }
    }
}

struct GatherArguments {
    // One column: the partials of a tensor, one after the other.
    Table table;
    Findings to;
    // Whether findings about tensors without partials stay as they are.
    u32 keep;
};

ENTRY(gradient_gather, GatherArguments) {
    const Table& table = arguments.table;
    u64 warps = threads_of_grid() / WARP;
    for (u64 tensor = thread_of_grid() / WARP; tensor < table.tensors; tensor += warps) {
        u64 begin = first_chunk(table, tensor), end = first_chunk(table, tensor + 1);
        if (begin == end && arguments.keep) continue;
        Partial own;
        for (u64 index = begin; index < end; index++) {
            Chunk chunk(table, index);
            for (u64 word = threadIdx.x % WARP * SCRATCH_WORDS; word < chunk.len(); word += WARP * SCRATCH_WORDS) {
                own.add(pointer<const u64>(chunk.address(0)) + word, L2);
            }
        }
        conclude(arguments.to, tensor, own, L2);
    }
}

// Rows of a table picked by number, and the gradient of the table.
//
//   embedding           out[r, c] = table[ids[r], c]
//   embedding_backward  grad_table[i, c] = sum of grad_out[r, c] over the rows with ids[r] = i
//
// Launch: embedding in steps of the grid; embedding_backward gives a row of the table to a warp, which looks
// through all numbers and sums in f64 in their order: no atomics, and the bits of its twin. A number that is no
// row picks NaN. Twins: src/launch/embedding.rs.
#include "access.cuh"

struct EmbeddingArguments {
    u64 table;
    u64 ids;
    u64 out;
    u64 len;
    u64 rows;
    u64 columns;
};

template <class C, class T>
__device__ void embedding(const EmbeddingArguments& g) {
    const T* table = pointer<const T>(g.table);
    const u32* ids = pointer<const u32>(g.ids);
    T* out = pointer<T>(g.out);
    for (u64 index = thread_of_grid(); index < g.len; index += threads_of_grid()) {
        u64 row = index / g.columns, id = ids[row];
        out[index] = id < g.rows ? table[id * g.columns + (index - row * g.columns)]
                                 : Narrow<T>::from(C(not_a_number()));
    }
}

ENTRIES_BY_FLOAT(embedding, EmbeddingArguments, embedding)

struct EmbeddingBackwardArguments {
    u64 grad_out;
    u64 ids;
    u64 grad_table;
    u64 count;
    u64 rows;
    u64 columns;
    u32 grad_table_type;
};

template <class C, class T>
__device__ void embedding_backward(const EmbeddingBackwardArguments& g) {
    const T* grad = pointer<const T>(g.grad_out);
    const u32* ids = pointer<const u32>(g.ids);
    u32 lane = threadIdx.x % WARP;
    u64 warps = threads_of_grid() / WARP;
    for (u64 row = thread_of_grid() / WARP; row < g.rows; row += warps) {
        for (u64 column = lane; column < g.columns; column += WARP) {
            double sum = 0;
            for (u64 place = 0; place < g.count; place++) {
                if (ids[place] == row) sum += widen<double>(grad[place * g.columns + column]);
            }
            store_one(Any(g.grad_table, g.grad_table_type), row * g.columns + column, sum);
        }
    }
}

ENTRIES_BY_FLOAT(embedding_backward, EmbeddingBackwardArguments, embedding_backward)

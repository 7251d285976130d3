// Reading and writing runs of elements, 16 bytes at a time where the addresses allow it.
//
// `Typed<T>` is an operand whose type the compiler knows, `Any` one whose type is a code, read element by
// element. Both load into and store from the compute type. `walk` visits every element once: a head up to
// the first place at which all operands are aligned, packs, and the rest. Operands that are never aligned
// together are all head. Any length goes, also 0 and more than 2^32.
#pragma once
#include "dtype.cuh"

// Tests count the bytes that are read and written here.
#ifndef KITSUNE_SHIM
#define NOTE_READ(bytes)
#define NOTE_WRITTEN(bytes)
#else
constexpr u32 size_of(u32 type) { return type == F64 ? 8 : type == F32 || type == U32 ? 4 : 2; }
#endif

// Elements that are moved at once.
template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT < 16 ? sizeof(T) * COUNT : 16) Pack {
    T at[COUNT];
};

template <class T>
struct Typed {
    static constexpr u32 SIZE = sizeof(T);
    T* at;

    __device__ explicit Typed(u64 address, u32 = 0) : at(pointer<T>(address)) {}

    __device__ u64 address() const { return reinterpret_cast<u64>(at); }

    template <int COUNT, class C>
    __device__ void load(u64 index, C* into) const {
        NOTE_READ(sizeof(T) * COUNT);
        Pack<T, COUNT> pack = *reinterpret_cast<const Pack<T, COUNT>*>(at + index);
#pragma unroll
        for (int i = 0; i < COUNT; i++) into[i] = widen<C>(pack.at[i]);
    }

    template <int COUNT, class C>
    __device__ void store(u64 index, const C* values) const {
        NOTE_WRITTEN(sizeof(T) * COUNT);
        Pack<T, COUNT> pack;
#pragma unroll
        for (int i = 0; i < COUNT; i++) pack.at[i] = Narrow<T>::from(values[i]);
        *reinterpret_cast<Pack<T, COUNT>*>(at + index) = pack;
    }
};

struct Any {
    // No packs: a pack of this size is one element.
    static constexpr u32 SIZE = 16;
    u64 start;
    u32 type;

    __device__ Any(u64 address, u32 type) : start(address), type(type) {}

    __device__ u64 address() const { return start; }

    template <int COUNT, class C>
    __device__ void load(u64 index, C* into) const {
        static_assert(COUNT == 1, "element by element");
        NOTE_READ(size_of(type));
        switch (type) {
            case F16: *into = widen<C>(pointer<f16>(start)[index]); break;
            case BF16: *into = widen<C>(pointer<bf16>(start)[index]); break;
            case F32: *into = widen<C>(pointer<float>(start)[index]); break;
            default: *into = widen<C>(pointer<double>(start)[index]);
        }
    }

    template <int COUNT, class C>
    __device__ void store(u64 index, const C* value) const {
        static_assert(COUNT == 1, "element by element");
        NOTE_WRITTEN(size_of(type));
        switch (type) {
            case F16: pointer<f16>(start)[index] = Narrow<f16>::from(*value); break;
            case BF16: pointer<bf16>(start)[index] = Narrow<bf16>::from(*value); break;
            case F32: pointer<float>(start)[index] = Narrow<float>::from(*value); break;
            default: pointer<double>(start)[index] = Narrow<double>::from(*value);
        }
    }
};

template <class C, class A>
__device__ inline C load_one(const A& operand, u64 index) {
    C value;
    operand.template load<1>(index, &value);
    return value;
}

template <class C, class A>
__device__ inline void store_one(const A& operand, u64 index, C value) {
    operand.template store<1>(index, &value);
}

// Elements of a pack: 16 bytes of the narrowest operand.
template <class A, class... Rest>
struct PackOf {
    static constexpr int OWN = 16 / A::SIZE, OTHERS = PackOf<Rest...>::value;
    static constexpr int value = OWN > OTHERS ? OWN : OTHERS;
};
template <class A>
struct PackOf<A> {
    static constexpr int value = 16 / A::SIZE;
};

template <int PACK, class A>
__device__ inline bool is_aligned(u64 index, const A& operand) {
    constexpr u32 BYTES = PACK * A::SIZE < 16 ? PACK * A::SIZE : 16;
    return (operand.address() + index * A::SIZE) % BYTES == 0;
}

// The first element at which a pack of every operand is aligned; `len` if there is none.
template <int PACK, class... As>
__device__ inline u64 aligned_from(u64 len, const As&... operands) {
    for (u64 index = 0; index < PACK && index < len; index++) {
        if ((is_aligned<PACK>(index, operands) && ...)) return index;
    }
    return len;
}

template <int N>
struct Count {
    static constexpr int value = N;
};

// Calls `body(index, Count<n>)` for packs and single elements, sharing `len` elements among `threads`
// threads of which this is number `thread`.
template <int PACK, class Body>
__device__ inline void walk(u64 len, u64 head, u64 thread, u64 threads, Body body) {
    u64 packs = (len - head) / PACK, tail = head + packs * PACK;
    for (u64 pack = thread; pack < packs; pack += threads) body(head + pack * PACK, Count<PACK>{});
    for (u64 edge = thread; edge < head + (len - tail); edge += threads) {
        body(edge < head ? edge : tail + (edge - head), Count<1>{});
    }
}

// As `walk`, with two packs of the compute type loaded before either is used: a kernel that only reads needs that
// much under way for each thread to keep memory busy. `load(index, values, Count<n>)`, then `use` likewise.
template <class C, int PACK, class Load, class Use>
__device__ inline void walk_pairs(u64 len, u64 head, u64 thread, u64 threads, Load load, Use use) {
    u64 packs = (len - head) / PACK, tail = head + packs * PACK, pack = thread;
    Count<PACK> whole;
    for (; pack + threads < packs; pack += 2 * threads) {
        u64 first = head + pack * PACK, second = first + threads * PACK;
        C of_first[PACK], of_second[PACK];
        load(first, of_first, whole);
        load(second, of_second, whole);
        use(first, of_first, whole);
        use(second, of_second, whole);
    }
    if (pack < packs) {
        C values[PACK];
        load(head + pack * PACK, values, whole);
        use(head + pack * PACK, values, whole);
    }
    Count<1> single;
    for (u64 edge = thread; edge < head + (len - tail); edge += threads) {
        u64 index = edge < head ? edge : tail + (edge - head);
        C value[1];
        load(index, value, single);
        use(index, value, single);
    }
}

// `out[i] = f(x[i])`, by the whole grid. `out` may be `x`.
template <class C, class X, class O, class F>
__device__ inline void map(X x, O out, u64 len, F f) {
    constexpr int PACK = PackOf<X, O>::value;
    u64 head = aligned_from<PACK>(len, x, out);
    walk<PACK>(len, head, thread_of_grid(), threads_of_grid(), [&](u64 index, auto count) {
        constexpr int COUNT = decltype(count)::value;
        C values[COUNT];
        x.template load<COUNT>(index, values);
#pragma unroll
        for (int i = 0; i < COUNT; i++) values[i] = f(values[i]);
        out.template store<COUNT>(index, values);
    });
}

// `out[i] = f(a[i], b[i])`, by the whole grid. `out` may be `a` or `b`.
template <class C, class A, class B, class O, class F>
__device__ inline void map2(A a, B b, O out, u64 len, F f) {
    constexpr int PACK = PackOf<A, B, O>::value;
    u64 head = aligned_from<PACK>(len, a, b, out);
    walk<PACK>(len, head, thread_of_grid(), threads_of_grid(), [&](u64 index, auto count) {
        constexpr int COUNT = decltype(count)::value;
        C left[COUNT], right[COUNT];
        a.template load<COUNT>(index, left);
        b.template load<COUNT>(index, right);
#pragma unroll
        for (int i = 0; i < COUNT; i++) left[i] = f(left[i], right[i]);
        out.template store<COUNT>(index, left);
    });
}

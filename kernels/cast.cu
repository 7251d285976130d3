// Conversion between float types: `dst[i] = src[i]`, rounded once. Between equal types (u32 included) the
// bits are copied. What is converted to an 8-bit type is brought to at most `limit` in magnitude before.
//
// Shapes: any length; `dst` may be `src` if their elements have one size. Launch: steps of the grid. Same
// bits as the twin, src/launch/cast.rs, but for the payload of NaN.
#include "access.cuh"

struct CastArguments {
    u64 src;
    u64 dst;
    u64 len;
    double limit;
};

// Equal types differ in size only, as far as a copy is concerned.
template <class T>
__device__ void copy(const CastArguments& g) {
    T* src = pointer<T>(g.src);
    T* dst = pointer<T>(g.dst);
    constexpr int PACK = 16 / sizeof(T);
    u64 head = aligned_from<PACK>(g.len, Typed<T>(g.src), Typed<T>(g.dst));
    walk<PACK>(g.len, head, thread_of_grid(), threads_of_grid(), [&](u64 index, auto count) {
        typedef Pack<T, decltype(count)::value> Run;
        NOTE_READ(sizeof(Run));
        NOTE_WRITTEN(sizeof(Run));
        *reinterpret_cast<Run*>(dst + index) = *reinterpret_cast<const Run*>(src + index);
    });
}

template <class S, class D>
struct Cast {
    static __device__ void run(const CastArguments& g) {
        // A value of either type is a value of the compute type, so that only the store rounds.
        typedef typename ComputeOf<S, D>::type C;
        C limit = C(g.limit);
        map<C>(Typed<S>(g.src), Typed<D>(g.dst), g.len, [=](C value) {
            if (!IsF8<D>::value) return value;
            // Neither holds for NaN.
            if (value > limit) return limit;
            return value < -limit ? -limit : value;
        });
    }
};
template <class T>
struct Cast<T, T> {
    static __device__ void run(const CastArguments& g) { copy<T>(g); }
};

template <class S, class D>
__device__ void cast(const CastArguments& g) {
    Cast<S, D>::run(g);
}

ENTRIES_BY_ANY_PAIR(cast, CastArguments, cast)
ENTRY(cast_u32_u32, CastArguments) { copy<u32>(arguments); }

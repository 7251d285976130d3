// As much of CUDA as kernels/ uses, on the host, for one block at a time.
//
// Each CUDA thread is a function call on a fiber: a stack of its own, left when the thread waits at a barrier
// and entered again when all others have arrived. A thread that ends without waiting leaves its fiber to the
// next one, so code without barriers costs no switches. Warps go as far as barriers let them, one after the
// other, first to last or last to first: a missing barrier shows in one of the two orders. Blocks run one
// after the other on the calling thread; several host threads may launch at once, as all state is theirs
// alone.
//
// Stricter than a device on purpose: a barrier or shuffle that some thread of the block or warp does not
// reach ends the launch with an error. What it cannot show: data races, and anything about speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#define KITSUNE_SHIM
#define __device__
#define __forceinline__ inline
// All threads of a block run on one host thread, one block at a time.
#define __shared__ static thread_local

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

using std::fabs;
using std::fma;
using std::sqrt;

namespace shim {

struct Index {
    u32 x;
};

// What a device's clock shows.
inline u64 nanoseconds() {
    auto now = std::chrono::steady_clock::now().time_since_epoch();
    return u64(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

typedef void (*Body)(const void* arguments);

enum class State { idle, ready, at_block_barrier, at_warp_barrier };

constexpr u32 WARP_SIZE = 32;
constexpr size_t STACK_BYTES = 64 * 1024;

struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t start;
    jmp_buf point;
    bool entered = false;
    State state = State::idle;
    Index thread = {0};
};

// The launch that this host thread works on.
struct World {
    Body body = nullptr;
    const void* arguments = nullptr;
    Index grid = {0}, block = {0}, block_index = {0};
    bool reversed = false;
    // Threads of the block that have begun, that may have, and that have ended.
    u32 begun = 0, may_begin = 0, ended = 0;
    // The fiber of each thread that has begun and not ended.
    std::vector<Fiber*> threads;
    Fiber* current = nullptr;
    jmp_buf scheduler;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> idle;
    // What lanes hand each other: two places a thread, used in turns, so that one barrier an exchange is
    // enough. A lane cannot be two exchanges ahead of another.
    std::vector<u64> slots[2];
    std::vector<unsigned char> turn;
    // Votes at the next block barrier, and the outcome of the last.
    bool vote = false, outcome = false;
};

World& world();

// Bytes of array elements that the launch of this host thread has read and written so far.
inline thread_local u64 bytes_read = 0, bytes_written = 0;

// Leaves the current thread in `state` until the scheduler finds that it may go on.
void wait(State state);

template <class T>
T exchange(T value, u32 from) {
    World& w = world();
    u32 self = w.current->thread.x;
    unsigned char turn = w.turn[self] ^= 1;
    std::memcpy(&w.slots[turn][self], &value, sizeof value);
    wait(State::at_warp_barrier);
    std::memcpy(&value, &w.slots[turn][from], sizeof value);
    return value;
}

struct Registration {
    Registration(const char* name, Body body);
};

}  // namespace shim

#define NOTE_READ(bytes) (shim::bytes_read += (bytes))
#define NOTE_WRITTEN(bytes) (shim::bytes_written += (bytes))

#define threadIdx (shim::world().current->thread)
#define blockIdx (shim::world().block_index)
#define blockDim (shim::world().block)
#define gridDim (shim::world().grid)

#define ENTRY(name, Arguments)                                                                 \
    static void entry_##name(Arguments arguments);                                             \
    static shim::Registration registration_##name(#name, [](const void* arguments) {           \
        entry_##name(*static_cast<const Arguments*>(arguments));                               \
    });                                                                                        \
    static void entry_##name([[maybe_unused]] Arguments arguments)

inline void __syncthreads() { shim::wait(shim::State::at_block_barrier); }
inline bool __syncthreads_or(bool vote) {
    if (vote) shim::world().vote = true;
    shim::wait(shim::State::at_block_barrier);
    return shim::world().outcome;
}
inline void __syncwarp() { shim::wait(shim::State::at_warp_barrier); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(u32, T value, u32 lanes) {
    return shim::exchange(value, shim::world().current->thread.x ^ lanes);
}

// Threads of a launch never run at the same time.
template <class T>
T atomicAdd(T* address, T value) {
    T before = *address;
    *address = before + value;
    return before;
}
template <class T>
T atomicMax(T* address, T value) {
    T before = *address;
    if (value > before) *address = value;
    return before;
}

template <class To, class From>
To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "bits are kept");
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}
inline u32 __float_as_uint(float value) { return bits_as<u32>(value); }
inline float __uint_as_float(u32 bits) { return bits_as<float>(bits); }
inline long long __double_as_longlong(double value) { return bits_as<long long>(value); }
inline double __longlong_as_double(long long bits) { return bits_as<double>(bits); }

// Plays allocations on PyTorch's caching allocator through its C++ entry points. peers.py compiles and loads it into
// a process in which PyTorch is set up.

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>

#include <chrono>
#include <cstdint>
#include <exception>
#include <vector>

namespace allocator = c10::cuda::CUDACachingAllocator;
using Clock = std::chrono::steady_clock;

static double nanoseconds(Clock::time_point start) {
    return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

static c10::cuda::CUDAStream stream(std::size_t number) {
    static std::vector<c10::cuda::CUDAStream> streams;
    while (streams.size() <= number) streams.push_back(c10::cuda::getStreamFromPool());
    return streams[number];
}

struct Operation {
    std::int64_t kind, slot, bytes, stream;
};

enum Kind { ALLOCATE = 0, FREE = 1, RECORD = 2 };

static void record(void* block, c10::cuda::CUDAStream user) {
    // The allocator takes a smart pointer; this one gives the block back to its owner.
    c10::DataPtr pointer(block, block, allocator::get()->raw_deleter(), c10::Device(c10::DeviceType::CUDA, 0));
    allocator::recordStream(pointer, user);
    pointer.release_context();
}

// Nanoseconds for one of `count` pairs of an allocation and its free.
extern "C" double player_pairs(std::int64_t bytes, std::int64_t count) {
    auto on = stream(0).stream();
    auto start = Clock::now();
    for (std::int64_t number = 0; number < count; number++) {
        allocator::raw_delete(allocator::raw_alloc_with_stream(bytes, on));
    }
    return nanoseconds(start) / count;
}

// Nanoseconds for all operations; below zero if there is no room.
extern "C" double player_play(const Operation* operations, std::int64_t count, std::int64_t slots, std::int64_t) {
    std::vector<void*> live(slots);
    auto start = Clock::now();
    try {
        for (const Operation* next = operations; next != operations + count; next++) {
            void*& block = live[next->slot];
            if (next->kind == ALLOCATE) {
                block = allocator::raw_alloc_with_stream(next->bytes, stream(next->stream).stream());
            } else if (next->kind == FREE) {
                if (block) allocator::raw_delete(block);
                block = nullptr;
            } else if (block) {
                record(block, stream(next->stream));
            }
        }
    } catch (const std::exception&) {
        for (void* block : live) {
            if (block) allocator::raw_delete(block);
        }
        return -1;
    }
    return nanoseconds(start);
}

// Entry points that test the shim itself; they are in no PTX.
#include "reduction.cuh"

struct ProbeArguments {
    u64 out;
};

// Every thread passes its number on to the next one through shared memory.
ENTRY(probe_rotate, ProbeArguments) {
    __shared__ u32 numbers[1024];
    numbers[threadIdx.x] = threadIdx.x;
    __syncthreads();
    u32 next = numbers[(threadIdx.x + 1) % blockDim.x];
    __syncthreads();
    pointer<u32>(arguments.out)[thread_of_grid()] = next;
}

// Sums by shuffles, twice in a row, and a vote of one thread.
ENTRY(probe_sums, ProbeArguments) {
    u32 sum = reduce_warp(threadIdx.x, Plus{});
    u32 all = reduce_block(1u, 0u, Plus{}) + reduce_block(sum, 0u, Plus{});
    bool one = __syncthreads_or(threadIdx.x == 7), none = __syncthreads_or(false);
    pointer<u32>(arguments.out)[thread_of_grid()] = all * 4 + (one ? 2 : 0) + (none ? 1 : 0);
}

// One thread leaves out a barrier of the block, or of its warp.
ENTRY(probe_divergent_block, ProbeArguments) {
    if (threadIdx.x != 5) __syncthreads();
}
ENTRY(probe_divergent_warp, ProbeArguments) {
    if (threadIdx.x != 37) __syncwarp();
}

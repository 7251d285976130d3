// How long the device takes between two points of a stream: starts a clock, or adds what it shows to a total.
//
//   start   clock = now
//   stop    total = total + (now - clock), in nanoseconds
//
// The clock keeps 52 bits, which f64 holds exactly; differences are taken modulo 2^52. Launch: one thread of
// one block does all. Twin: src/launch/stopwatch.rs.
#include "journal.cuh"

struct StopwatchArguments {
    u64 clock;
    // 0 to start.
    u64 total;
};

__device__ inline u64 nanoseconds() {
#ifdef KITSUNE_SHIM
    return shim::nanoseconds();
#else
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
#endif
}

ENTRY(stopwatch, StopwatchArguments) {
    if (thread_of_grid() > 0) return;
    constexpr u64 MASK = (u64(1) << 52) - 1;
    double* clock = pointer<double>(arguments.clock);
    u64 now = nanoseconds() & MASK;
    if (!arguments.total) *clock = double(now);
    else *pointer<double>(arguments.total) += double((now - u64(*clock)) & MASK);
}

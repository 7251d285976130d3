// Runs launches: fibers, their scheduler, and the function that the library exports.

#include <atomic>
#include <map>
#include <string>

namespace shim {

World& world() {
    static thread_local World world;
    return world;
}

static std::map<std::string, Body>& entries() {
    static std::map<std::string, Body> entries;
    return entries;
}

Registration::Registration(const char* name, Body body) { entries()[name] = body; }

// The place of the nth thread, or block, to run among `count`.
static u32 place(u32 nth, u32 count) { return world().reversed ? count - 1 - nth : nth; }

void wait(State state) {
    Fiber* self = world().current;
    self->state = state;
    if (_setjmp(self->point) == 0) _longjmp(world().scheduler, 1);
}

// What every fiber runs for ever: threads, as long as there are some to begin.
static void run_threads() {
    for (;;) {
        World& w = world();
        while (w.begun < w.may_begin) {
            u32 thread = place(w.begun++, w.block.x);
            w.current->thread.x = thread;
            w.threads[thread] = w.current;
            w.body(w.arguments);
            w.threads[thread] = nullptr;
            w.ended++;
        }
        w.idle.push_back(w.current);
        wait(State::idle);
    }
}

// Runs `fiber` until it waits.
static void enter(Fiber* fiber) {
    World& w = world();
    w.current = fiber;
    if (_setjmp(w.scheduler) != 0) return;
    if (fiber->entered) _longjmp(fiber->point, 1);
    fiber->entered = true;
    fiber->stack.reset(new char[STACK_BYTES]);
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack.get();
    fiber->start.uc_stack.ss_size = STACK_BYTES;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, run_threads, 0);
    setcontext(&fiber->start);
}

static Fiber* idle_fiber() {
    World& w = world();
    if (w.idle.empty()) {
        w.fibers.push_back(std::make_unique<Fiber>());
        return w.fibers.back().get();
    }
    Fiber* fiber = w.idle.back();
    w.idle.pop_back();
    return fiber;
}

// Begins the threads of the nth warp, or runs those that may go on until each waits again. False if there
// are none.
static bool advance_warp(u32 nth) {
    World& w = world();
    if (w.begun == nth * WARP_SIZE) {
        w.may_begin = w.begun + WARP_SIZE;
        while (w.begun < w.may_begin) enter(idle_fiber());
        return true;
    }
    Fiber** lanes = &w.threads[place(nth, w.block.x / WARP_SIZE) * WARP_SIZE];
    u32 ready = 0, at_barrier = 0;
    for (u32 lane = 0; lane < WARP_SIZE; lane++) {
        if (!lanes[lane]) continue;
        if (lanes[lane]->state == State::ready) ready++;
        if (lanes[lane]->state == State::at_warp_barrier) at_barrier++;
    }
    if (ready == 0 && at_barrier < WARP_SIZE) return false;
    for (u32 number = 0; number < WARP_SIZE; number++) {
        Fiber* fiber = lanes[place(number, WARP_SIZE)];
        if (fiber && (fiber->state == State::ready || at_barrier == WARP_SIZE)) enter(fiber);
    }
    return true;
}

// Lets all threads go on if every one of them is at the block's barrier.
static bool release_block() {
    World& w = world();
    for (Fiber* fiber : w.threads) {
        if (!fiber || fiber->state != State::at_block_barrier) return false;
    }
    for (Fiber* fiber : w.threads) fiber->state = State::ready;
    w.outcome = w.vote;
    w.vote = false;
    return true;
}

// False if threads wait for others that never come. One warp after the other goes as far as it can, so that
// what is not held back by a barrier gets ahead.
static bool run_block() {
    World& w = world();
    w.begun = w.may_begin = w.ended = 0;
    w.vote = false;
    w.threads.assign(w.block.x, nullptr);
    for (auto& slots : w.slots) slots.assign(w.block.x, 0);
    w.turn.assign(w.block.x, 0);
    while (w.ended < w.block.x) {
        bool any = false;
        for (u32 nth = 0; nth < w.block.x / WARP_SIZE; nth++) {
            while (advance_warp(nth)) any = true;
        }
        if (w.ended < w.block.x && !release_block() && !any) return false;
    }
    return true;
}

static std::atomic<bool> reversed{false};

}  // namespace shim

enum { DONE = 0, UNKNOWN_ENTRY = 1, KERNEL_ERROR = 2 };

// Runs entry point `entry` on a grid of `blocks` blocks of `threads` threads; `arguments` is its struct.
extern "C" int kitsune_host_launch(const char* entry, unsigned blocks, unsigned threads, unsigned shared,
                                   const void* arguments) {
    using namespace shim;
    auto found = entries().find(entry);
    if (found == entries().end()) return UNKNOWN_ENTRY;
    if (blocks == 0 || threads == 0 || threads % WARP_SIZE != 0 || threads > 1024 || shared != 0) {
        return KERNEL_ERROR;
    }
    World& w = world();
    bytes_read = bytes_written = 0;
    w.body = found->second;
    w.arguments = arguments;
    w.grid = {blocks};
    w.block = {threads};
    w.reversed = reversed;
    for (u32 nth = 0; nth < blocks; nth++) {
        w.block_index = {place(nth, blocks)};
        if (!run_block()) {
            // The stacks of the threads that still wait go with their fibers.
            w.idle.clear();
            w.fibers.clear();
            return KERNEL_ERROR;
        }
    }
    return DONE;
}

// Bytes of array elements that the last launch of this thread read and wrote.
extern "C" void kitsune_host_traffic(unsigned long long* bytes) {
    bytes[0] = shim::bytes_read;
    bytes[1] = shim::bytes_written;
}

// Runs threads and blocks last to first from now on, or first to last: results must not depend on it.
extern "C" void kitsune_host_reverse(int reverse) { shim::reversed = reverse != 0; }

// Name of entry point `index` in alphabetical order, or null.
extern "C" const char* kitsune_host_entry(unsigned index) {
    for (auto& entry : shim::entries()) {
        if (index-- == 0) return entry.first.c_str();
    }
    return nullptr;
}

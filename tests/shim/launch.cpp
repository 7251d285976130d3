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

// What every fiber runs for ever: threads of the block until all have begun, then the next block's.
static void run_threads() {
    for (;;) {
        World& w = world();
        while (w.begun < w.block.x) {
            w.current->thread.x = place(w.begun++, w.block.x);
            w.body(w.arguments);
            w.ended++;
        }
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
    for (auto& fiber : w.fibers) {
        if (fiber->state == State::idle) return fiber.get();
    }
    w.fibers.push_back(std::make_unique<Fiber>());
    return w.fibers.back().get();
}

// Lets threads go on whose barrier all others have reached. False if there are none.
static bool release() {
    World& w = world();
    u32 at_block_barrier = 0;
    std::vector<u32> at_warp_barrier((w.block.x + WARP_SIZE - 1) / WARP_SIZE);
    for (auto& fiber : w.fibers) {
        if (fiber->state == State::at_block_barrier) at_block_barrier++;
        if (fiber->state == State::at_warp_barrier) at_warp_barrier[fiber->thread.x / WARP_SIZE]++;
    }
    bool whole_block = at_block_barrier == w.block.x, any = whole_block;
    if (whole_block) {
        w.outcome = w.vote;
        w.vote = false;
    }
    for (auto& fiber : w.fibers) {
        bool whole_warp = fiber->state == State::at_warp_barrier &&
                          at_warp_barrier[fiber->thread.x / WARP_SIZE] == WARP_SIZE;
        if (whole_warp || (whole_block && fiber->state == State::at_block_barrier)) {
            fiber->state = State::ready;
            any = true;
        }
    }
    return any;
}

// False if threads wait for others that never come.
static bool run_block() {
    World& w = world();
    w.begun = w.ended = 0;
    w.vote = false;
    for (auto& slots : w.slots) slots.assign(w.block.x, 0);
    w.turn.assign(w.block.x, 0);
    while (w.begun < w.block.x) enter(idle_fiber());
    while (w.ended < w.block.x) {
        if (!release()) return false;
        size_t count = w.fibers.size();
        for (size_t nth = 0; nth < count; nth++) {
            Fiber* fiber = w.fibers[nth].get();
            if (fiber->state == State::ready) enter(fiber);
        }
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
    w.body = found->second;
    w.arguments = arguments;
    w.grid = {blocks};
    w.block = {threads};
    w.reversed = reversed;
    for (u32 nth = 0; nth < blocks; nth++) {
        w.block_index = {place(nth, blocks)};
        if (!run_block()) {
            // The stacks of the threads that still wait go with their fibers.
            w.fibers.clear();
            return KERNEL_ERROR;
        }
    }
    return DONE;
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

// The fibers behind common.cuh.
#include "common.cuh"

#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <vector>

emulation::Index threadIdx, blockIdx, gridDim;

namespace emulation {

Gpu gpu{0, 90, 132, 227 << 10, 16, false};

namespace {

constexpr std::size_t kStack = 64 << 10, kGuard = 1024;

struct Fiber {
    ucontext_t context;
    unsigned thread, block;
    bool done;
};

// The fibers that wait at a barrier until all have arrived.
struct Barrier {
    std::vector<Fiber*> waiting;
};

std::vector<std::unique_ptr<char[]>> stacks;
ucontext_t scheduler;
Fiber* current;
std::vector<Fiber*> ready;
std::vector<Fiber> fibers;
std::vector<std::vector<std::max_align_t>> memories;
std::vector<Barrier> warps, blocks, clusters;
std::vector<std::uint32_t> warp_words;
unsigned threads_of_block, blocks_of_cluster, first_block;
const std::function<void()>* body_of_thread;
std::uint64_t drawn = 1;
long spins;

void enter() {
    (*body_of_thread)();
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

void start(Fiber& fiber, unsigned thread, unsigned block, char* stack) {
    fiber.thread = thread, fiber.block = block;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
    ready.push_back(&fiber);
}

unsigned warp_of(const Fiber& fiber) { return (fiber.block * threads_of_block + fiber.thread) / 32; }

}  // namespace

void meet(Place place) {
    spins = 0;
    const unsigned block = current->block;
    const unsigned size = place == Place::warp ? 32 : threads_of_block * (place == Place::cluster ? blocks_of_cluster : 1);
    Barrier& barrier = place == Place::warp    ? warps[warp_of(*current)]
                       : place == Place::block ? blocks[block]
                                               : clusters[block / blocks_of_cluster];
    barrier.waiting.push_back(current);
    if (barrier.waiting.size() == size) {
        ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
        barrier.waiting.clear();
    }
    swapcontext(&current->context, &scheduler);
}

void pause() {
    ++spins;
    ready.push_back(current);
    swapcontext(&current->context, &scheduler);
}

void* shared_memory() { return memories[current->block].data(); }

std::uint32_t (*warp_memory())[8] {
    return reinterpret_cast<std::uint32_t(*)[8]>(warp_words.data() + std::size_t{warp_of(*current)} * 32 * 8);
}

void run(unsigned grid, unsigned threads, unsigned together, unsigned cluster, std::size_t shared,
         const std::function<void()>& body) {
    body_of_thread = &body, threads_of_block = threads, blocks_of_cluster = cluster;
    const std::size_t count = std::size_t{threads} * together;
    while (stacks.size() < count) stacks.emplace_back(new char[kStack]);
    gridDim.x = grid;
    for (first_block = 0; first_block < grid; first_block += together) {
        fibers.assign(count, {});
        warps.assign(count / 32, {}), blocks.assign(together, {}), clusters.assign(together / cluster, {});
        warp_words.assign(count * 8, 0);
        const std::size_t size = (shared + kGuard) / sizeof(std::max_align_t) + 1;
        memories.assign(together, std::vector<std::max_align_t>(size));
        for (auto& memory : memories) std::memset(memory.data(), 0xff, size * sizeof(std::max_align_t));
        ready.clear();
        for (unsigned i = 0; i < count; ++i) start(fibers[i], i % threads, i / threads, stacks[i].get());
        std::size_t finished = 0;
        spins = 0;
        while (!ready.empty() && spins < 10'000'000) {
            drawn = drawn * 6364136223846793005u + 1442695040888963407u;
            std::swap(ready[(drawn >> 33) % ready.size()], ready.back());
            current = ready.back();
            ready.pop_back();
            threadIdx.x = current->thread, blockIdx.x = first_block + current->block;
            swapcontext(&scheduler, &current->context);
            finished += current->done;
        }
        if (finished < count) throw std::runtime_error("a launch hangs: threads wait for others that do not come");
        for (const auto& memory : memories)
            for (std::size_t i = shared; i < shared + kGuard; ++i)
                if (reinterpret_cast<const unsigned char*>(memory.data())[i] != 0xff)
                    throw std::runtime_error("a launch writes beyond its shared memory");
    }
}

}  // namespace emulation

// Chooses the GPU that is emulated from now on.
extern "C" __attribute__((visibility("default"))) void emulate(int arch, int processors, int shared, int largest_cluster, int idle) {
    emulation::gpu = {emulation::gpu.id + 1, arch, processors, shared, largest_cluster, idle != 0};
}

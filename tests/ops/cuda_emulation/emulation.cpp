// The fibers behind common.cuh.
#include "common.cuh"

#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

emulation::Index threadIdx, blockIdx, gridDim;

namespace emulation {

Gpu gpu{0, 90, 132, 227 << 10, 16, false};
Fault fault = Fault::none;

namespace {

constexpr std::size_t kStack = 64 << 10, kGuard = 1024;

struct Fiber {
    ucontext_t context;
    unsigned thread, block;
    bool done;
    std::vector<std::pair<std::uint16_t*, std::uint16_t>> stored;  // what only this thread sees
};

// A value that a block has released.
struct Released {
    std::uint64_t time;
    unsigned block;
    std::uint16_t value;
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
std::vector<std::unordered_map<std::uint16_t*, std::uint16_t>> seen_by_block;  // stored and not released
std::unordered_map<std::uint16_t*, std::vector<Released>> released;  // the values of each place, in order of time
std::vector<std::uint64_t> acquired;  // by each block: it sees what was released up to this time
std::uint64_t now;
std::vector<std::uint32_t> warp_words;
unsigned threads_of_block, blocks_of_cluster;
const std::function<void()>* body_of_thread;
std::uint64_t random_bits = 1;
long spins;

std::size_t draw(std::size_t size) {
    random_bits = random_bits * 6364136223846793005u + 1442695040888963407u;
    return (random_bits >> 33) % size;
}

void show_to_block(Fiber& fiber) {
    for (const auto& [to, value] : fiber.stored) seen_by_block[fiber.block][to] = value;
    fiber.stored.clear();
}

void release_of(unsigned block) {
    ++now;
    for (const auto& [to, value] : seen_by_block[block]) released[to].push_back({now, block, value});
    seen_by_block[block].clear();
}

void enter() {
    (*body_of_thread)();
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

void start(Fiber& fiber, unsigned thread, unsigned block, char* stack) {
    fiber.thread = thread, fiber.block = block;
    fiber.stored.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
    ready.push_back(&fiber);
}

unsigned warp_of(const Fiber& fiber) { return (fiber.block * threads_of_block + fiber.thread) / 32; }

}  // namespace

void store(std::uint16_t* to, std::uint16_t value) { current->stored.emplace_back(to, value); }

std::uint16_t load(const std::uint16_t* from) {
    if (fault == Fault::load) return *from;
    for (auto own = current->stored.rbegin(); own != current->stored.rend(); ++own)
        if (own->first == from) return own->second;
    const unsigned block = current->block;
    auto* const place = const_cast<std::uint16_t*>(from);
    if (const auto seen = seen_by_block[block].find(place); seen != seen_by_block[block].end()) return seen->second;
    if (const auto values = released.find(place); values != released.end())
        for (auto one = values->second.rbegin(); one != values->second.rend(); ++one)
            if (one->block == block || one->time <= acquired[block]) return one->value;
    return *from;
}

void release() {
    if (fault == Fault::release) return;
    show_to_block(*current);
    release_of(current->block);
}

void acquire() {
    if (fault != Fault::acquire) acquired[current->block] = now;
}

void meet(Place place) {
    spins = 0;
    if (place == Place::block && fault != Fault::block) show_to_block(*current);
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
    released.clear();
    std::vector<unsigned> firsts;
    for (unsigned first = 0; first < grid; first += together) firsts.push_back(first);
    for (std::size_t i = firsts.size(); i > 1; --i) std::swap(firsts[i - 1], firsts[draw(i)]);
    for (const unsigned first_block : firsts) {
        fibers.resize(count);
        for (Fiber& fiber : fibers) fiber.done = false;
        seen_by_block.assign(together, {}), acquired.assign(together, now);
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
            std::swap(ready[draw(ready.size())], ready.back());
            current = ready.back();
            ready.pop_back();
            threadIdx.x = current->thread, blockIdx.x = first_block + current->block;
            swapcontext(&scheduler, &current->context);
            finished += current->done;
        }
        for (Fiber& fiber : fibers) show_to_block(fiber);
        for (unsigned block = 0; block < together; ++block) release_of(block);
        if (finished < count) throw std::runtime_error("a launch hangs: threads wait for others that do not come");
        for (const auto& memory : memories)
            for (std::size_t i = shared; i < shared + kGuard; ++i)
                if (reinterpret_cast<const unsigned char*>(memory.data())[i] != 0xff)
                    throw std::runtime_error("a launch writes beyond its shared memory");
    }
    for (const auto& [to, values] : released) *to = values.back().value;
}

}  // namespace emulation

// Chooses the GPU that is emulated from now on.
extern "C" __attribute__((visibility("default"))) void emulate(int arch, int processors, int shared, int largest_cluster, int idle) {
    emulation::gpu = {emulation::gpu.id + 1, arch, processors, shared, largest_cluster, idle != 0};
    emulation::fault = emulation::Fault::none;
}

// Leaves out a part of every barrier from now on.
extern "C" __attribute__((visibility("default"))) void leave_out(int part) { emulation::fault = static_cast<emulation::Fault>(part); }

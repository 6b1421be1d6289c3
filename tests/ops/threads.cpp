// Uses the threads of csrc from several threads at once. test_sanitizers.py compiles it with ThreadSanitizer, which
// reports accesses to one place that nothing orders. There is no OpenMP here, so the pool of csrc/parallel.cpp runs.
// With the argument "race", a unit of work has such an access.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <thread>

#include "../../csrc/executable.h"
#include "../../csrc/isa.h"

using namespace metakern;
using std::int64_t;

namespace {

std::atomic<int> checks{0};

void check(bool holds, const char* what) {
    ++checks;
    if (holds) return;
    std::printf("%s\n", what);
    std::exit(1);
}

void each(int64_t units, int threads, std::function<void(int64_t)> unit) {
    parallel(
        units, threads, [](void* context, int64_t i) { (*static_cast<std::function<void(int64_t)>*>(context))(i); },
        &unit);
}

// Every unit runs once, whatever the number of threads, in units of units too; an exception reaches the caller.
void units(unsigned seed) {
    std::mt19937 random(seed);
    for (int round = 0; round < 40; ++round) {
        const int64_t count = random() % 50;
        const int threads = 1 + random() % 5;
        std::vector<int> seen(static_cast<std::size_t>(count) * 8);
        each(count, threads, [&](int64_t i) {
            auto* memory = static_cast<int64_t*>(thread_memory(64 + i % 7 * 4096));
            memory[0] = i;
            each(8, threads, [&](int64_t j) { ++seen[static_cast<std::size_t>(i * 8 + j)]; });
        });
        for (int times : seen) check(times == 1, "a unit must run once");
        bool thrown = false;
        try {
            each(count, threads, [&](int64_t i) { if (i == count / 2) throw std::runtime_error("unit"); });
        } catch (const std::runtime_error&) {
            thrown = true;
        }
        check(thrown == (count > 0), "an exception of a unit must reach the caller");
    }
}

// Programs of elementwise instructions and a product, with results that do not depend on the threads.
void executables(unsigned seed) {
    std::mt19937 random(seed);
    const int64_t rows = 96, columns = 512, size = rows * columns;
    for (int round = 0; round < 6; ++round) {
        Executable program(2 * size * 4, 3);
        program.instruction("mul", kFloat32, 0, {{0, 0}, {1, 0}, {1, 0}}, {rows, columns},
                            {{columns, 1}, {columns, 1}, {columns, 1}}, {0, 0});
        program.instruction("tanh", kFloat32, 0, {{0, size * 4}, {0, 0}}, {size}, {{1}, {1}}, {0, 0});
        program.product(false, {Place{0, 0}, Place{0, size * 4}, Place{-1, 0}, Place{2, 0}, Place{-1, 0}, Place{-1, 0}},
                        {1, rows, rows, columns}, {size, columns, 1, size, 1, columns, 0, 0}, 1.0, 0);
        const std::size_t runs = 1 + random() % 4;
        const auto count = static_cast<std::size_t>(size), products = static_cast<std::size_t>(rows * rows);
        std::vector<float> x(count * runs), alone(products * runs), shared(products * runs);
        for (float& value : x) value = static_cast<float>(random() % 1000) / 500 - 1;
        const auto bases = [&](std::vector<float>& y) {
            std::vector<std::vector<std::uintptr_t>> all;
            for (std::size_t i = 0; i < runs; ++i)
                all.push_back({0, reinterpret_cast<std::uintptr_t>(&x[i * count]), reinterpret_cast<std::uintptr_t>(&y[i * products])});
            return all;
        };
        set_isa(isas()[random() % isas().size()].name);
        check(program.run(bases(alone), 1, false), "a run must end");
        check(program.run(bases(shared), 3, false), "a run must end");
        check(!std::memcmp(alone.data(), shared.data(), alone.size() * sizeof(float)), "threads must not change a result");
        program.release();
    }
}

void at_once(void (*work)(unsigned)) {
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 3; ++i) threads.emplace_back(work, i);
    for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1 && !std::strcmp(argv[1], "race")) {
        int64_t sum = 0;
        for (int round = 0; round < 100; ++round) each(1000, 4, [&](int64_t i) { sum += i; });
        std::printf("%lld\n", static_cast<long long>(sum));
        return 0;
    }
    at_once(units);
    at_once(executables);
    if (const pid_t child = fork()) {
        int status;
        waitpid(child, &status, 0);
        check(WIFEXITED(status) && !WEXITSTATUS(status), "a forked child must work");
    } else {
        units(7);
        executables(7);
        std::_Exit(0);
    }
    units(8);
    std::printf("%d checks\n", checks.load());
}

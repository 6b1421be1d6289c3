// Threads, and memory from outside the kernels' own instruction sets.
#pragma once

#include <cstdint>

namespace metakern {

// Calls unit(context, i) once for each i in [0, units), on at most `threads` threads, and returns when all are done.
// What a unit is must not depend on `threads`: then results do not either, bit for bit.
void parallel(std::int64_t units, int threads, void (*unit)(void*, std::int64_t), void* context);

// The same for a lambda. Everything inline here lives in each kernel file's own namespace of one instruction set,
// lest the linker keep the AVX-512 copy of a shared template for every machine.
#ifdef METAKERN_ISA
namespace METAKERN_ISA {

template <class Unit>
inline void parallel_for(std::int64_t units, int threads, Unit unit) {
    parallel(units, threads, [](void* context, std::int64_t i) { (*static_cast<Unit*>(context))(i); }, &unit);
}

}  // namespace METAKERN_ISA
#endif

// Uninitialized memory for partial sums, 64-byte aligned.
class Scratch {
public:
    explicit Scratch(std::int64_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <class F>
    F* as() const {
        return static_cast<F*>(memory_);
    }

private:
    void* memory_;
};

// Memory of the calling thread, at least so large and 64-byte aligned; good until the thread asks again.
void* thread_memory(std::int64_t bytes);

}  // namespace metakern

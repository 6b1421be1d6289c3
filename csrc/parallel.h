// Threads and scratch memory for the kernels. parallel.cpp is compiled once, not for each instruction set.
#pragma once

#include <cstdint>

namespace metakern {

// Calls unit(context, i) once for each i in [0, units), on at most `threads` threads, and returns when all are done.
// What a unit computes must not depend on `threads`; then the results do not either, bit for bit.
void parallel(std::int64_t units, int threads, void (*unit)(void*, std::int64_t), void* context);

// `parallel` for a lambda. It is in the namespace of an instruction set: of a template that they shared, the linker
// would keep one copy for all, which might be the AVX-512 one.
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
    std::int64_t bytes_;
    void* memory_;
};

// Memory of the calling thread: at least `bytes` bytes, 64-byte aligned, valid until the thread's next call.
void* thread_memory(std::int64_t bytes);

}  // namespace metakern

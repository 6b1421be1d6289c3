// For rules that work row by row on tensors [T, N, D], with sums over each task's rows.
#pragma once

#include "../kernel.h"
#include "../parallel.h"
#include "simd.h"

namespace metakern::METAKERN_ISA {

// The elements of a unit of work: enough to be worth waking a thread.
constexpr int64_t kUnit = 16384;

// Returns the tensors of a call one by one, in the order of the signature. next(false) returns null and skips nothing:
// it stands for a tensor that this variant of the kernel does not have.
template <class F>
class Tensors {
public:
    explicit Tensors(const Args& args) : next_(args.tensors) {}
    F* next(bool exists = true) { return exists ? static_cast<F*>(*next_++) : nullptr; }

private:
    void* const* next_;
};

// The N rows of each of T tasks, in blocks whose size depends only on D, the length of a row. A task has at least one
// block.
struct Blocks {
    int64_t T, N, D, rows, per_task;
    int threads;

    Blocks(int64_t T, int64_t N, int64_t D, int threads)
        : T(T), N(N), D(D), rows(kUnit / (D + 1) + 1), per_task(N ? (N + rows - 1) / rows : 1),
          threads(T * N * D < kUnit ? 1 : threads) {}

    // body(task, block of the task, first row, row after the last), rows counted over all tasks.
    template <class Body>
    void run(Body body) const {
        parallel_for(T * per_task, threads, [&](int64_t unit) {
            const int64_t t = unit / per_task, b = unit % per_task, end = (b + 1) * rows;
            body(t, b, t * N + b * rows, t * N + (end < N ? end : N));
        });
    }
};

// A sum over each task's rows, [T, D]. Each block has a partial sum, and `finish` adds these in order.
template <class F>
class TaskSums {
public:
    TaskSums(F* out, const Blocks& blocks)
        : out_(out), blocks_(blocks),
          rest_(out ? blocks.T * (blocks.per_task - 1) * blocks.D * static_cast<int64_t>(sizeof(F)) : 0) {}

    // The partial sum of a block, set to zero; null if the sum is not wanted.
    F* of(int64_t t, int64_t b) const {
        if (!out_) return nullptr;
        F* p = b ? block(t, b) : out_ + t * blocks_.D;
        std::memset(p, 0, static_cast<std::size_t>(blocks_.D) * sizeof(F));
        return p;
    }

    void finish() const {
        if (!out_) return;
        for (int64_t t = 0; t < blocks_.T; ++t)
            for (int64_t b = 1; b < blocks_.per_task; ++b)
                each<F>(blocks_.D, [&, sum = out_ + t * blocks_.D, part = block(t, b)](int64_t i, auto... n) {
                    add(sum + i, load(part + i, n...), n...);
                });
    }

private:
    F* block(int64_t t, int64_t b) const {
        return rest_.as<F>() + (t * (blocks_.per_task - 1) + b - 1) * blocks_.D;
    }

    F* out_;
    const Blocks& blocks_;
    Scratch rest_;
};

}  // namespace metakern::METAKERN_ISA

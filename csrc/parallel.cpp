// The threads of parallel.h are those of the OpenMP runtime that PyTorch has loaded, found by the name of its entry point:
// they are awake, and threads of our own would compete with them for the cores, since they spin for a while after each of
// PyTorch's own parallel regions. Where there is none, and in a forked child, which it does not survive, a pool.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

namespace metakern {
namespace {

class Pool {
public:
    void run(std::int64_t units, int threads, void (*unit)(void*, std::int64_t), void* context) {
        std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
        if (!alone) {  // another Python thread has the workers: this one works by itself
            for (std::int64_t i = 0; i < units; ++i) unit(context, i);
            return;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        const int wanted = static_cast<int>(units < threads ? units : threads) - 1;
        while (workers_ < wanted && start_worker()) ++workers_;
        unit_ = unit;
        context_ = context;
        units_ = units;
        next_ = 0;
        seats_ = wanted < workers_ ? wanted : workers_;
        lock.unlock();
        wake_.notify_all();
        work();
        lock.lock();
        seats_ = 0;  // whoever has not come yet need not
        done_.wait(lock, [this] { return working_ == 0; });
    }

private:
    bool start_worker() {
        try {
            std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {  // no more threads to be had: fewer will do
            return false;
        }
        return true;
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return seats_ > 0; });
            --seats_;
            ++working_;
            lock.unlock();
            work();
            lock.lock();
            if (--working_ == 0) done_.notify_one();
        }
    }

    void work() {
        for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < units_;) unit_(context_, i);
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    std::atomic<std::int64_t> next_{0};
    void (*unit_)(void*, std::int64_t) = nullptr;
    void* context_ = nullptr;
    std::int64_t units_ = 0;
    int workers_ = 0, seats_ = 0, working_ = 0;
};

using OpenMP = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
OpenMP openmp = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));

// Never destroyed: detached workers wait on it when the process exits. A forked child, which has no workers, starts anew.
Pool* pool = [] {
    pthread_atfork(nullptr, nullptr, [] {
        openmp = nullptr;
        pool = new Pool;
    });
    return new Pool;
}();

struct Units {
    std::int64_t count;
    void (*unit)(void*, std::int64_t);
    void* context;
    std::atomic<std::int64_t> next{0};

    static void work(void* self) {
        auto& units = *static_cast<Units*>(self);
        for (std::int64_t i; (i = units.next.fetch_add(1, std::memory_order_relaxed)) < units.count;)
            units.unit(units.context, i);
    }
};

}  // namespace

void parallel(std::int64_t count, int threads, void (*unit)(void*, std::int64_t), void* context) {
    if (count > 1 && threads > 1) {
        if (!openmp) return pool->run(count, threads, unit, context);
        Units units{count, unit, context};
        return openmp(Units::work, &units, static_cast<unsigned>(count < threads ? count : threads), 0);
    }
    for (std::int64_t i = 0; i < count; ++i) unit(context, i);
}

void* thread_memory(std::int64_t bytes) {
    thread_local std::unique_ptr<Scratch> memory;
    thread_local std::int64_t size = 0;
    if (size < bytes) {
        size = 0;
        memory.reset();  // before the larger one is there
        memory = std::make_unique<Scratch>(bytes);
        size = bytes;
    }
    return memory->as<void>();
}

Scratch::Scratch(std::int64_t bytes)
    : memory_(::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64})) {}

Scratch::~Scratch() { ::operator delete(memory_, std::align_val_t{64}); }

}  // namespace metakern

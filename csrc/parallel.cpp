// The pool of parallel.h. OpenMP is not used: a second OpenMP runtime beside PyTorch's makes both spin.
#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
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

// Never destroyed: detached workers wait on it when the process exits. A forked child, which has no workers, starts anew.
Pool* pool = [] {
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return new Pool;
}();

}  // namespace

void parallel(std::int64_t units, int threads, void (*unit)(void*, std::int64_t), void* context) {
    if (units > 1 && threads > 1) return pool->run(units, threads, unit, context);
    for (std::int64_t i = 0; i < units; ++i) unit(context, i);
}

Scratch::Scratch(std::int64_t bytes)
    : memory_(::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64})) {}

Scratch::~Scratch() { ::operator delete(memory_, std::align_val_t{64}); }

}  // namespace metakern

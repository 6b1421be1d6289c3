// The threads of parallel.h are those of the OpenMP runtime that PyTorch has loaded, found by the name of its entry
// point, which GNU's runtime and LLVM's both have; so the build needs no OpenMP, which Apple's compiler lacks. Its threads
// spin for a while after each of PyTorch's own parallel regions: so they are awake, and threads of our own would compete
// with them for the cores. A pool of our own is used without that runtime, and in a forked child, where it does not work.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

namespace metakern {
namespace {

// The units of one call, each taken by the first thread that is free. An exception, such as std::bad_alloc, must not
// leave a worker thread: the first one is rethrown to the caller when all threads are done.
class Units {
public:
    Units(std::int64_t count, void (*unit)(void*, std::int64_t), void* context)
        : count_(count), unit_(unit), context_(context) {}

    void work() {
        try {
            for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) unit_(context_, i);
        } catch (...) {
            if (!failed_.test_and_set()) error_ = std::current_exception();
            next_ = count_;
        }
    }

    void finish() const {
        if (error_) std::rethrow_exception(error_);
    }

private:
    std::int64_t count_;
    void (*unit_)(void*, std::int64_t);
    void* context_;
    std::atomic<std::int64_t> next_{0};
    std::atomic_flag failed_ = ATOMIC_FLAG_INIT;
    std::exception_ptr error_;
};

class Pool {
public:
    void run(Units& units, int threads) {
        std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
        if (!alone) return units.work();  // another Python thread uses the workers: work on this one alone
        std::unique_lock<std::mutex> lock(mutex_);
        const int wanted = threads - 1;
        while (workers_ < wanted && start_worker()) ++workers_;
        units_ = &units;
        seats_ = wanted < workers_ ? wanted : workers_;
        lock.unlock();
        wake_.notify_all();
        units.work();
        lock.lock();
        seats_ = 0;  // workers that have not started yet need not
        done_.wait(lock, [this] { return working_ == 0; });
    }

private:
    bool start_worker() {
        try {
            std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {  // the system gives no more threads: go on with fewer
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
            units_->work();
            lock.lock();
            if (--working_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    Units* units_ = nullptr;
    int workers_ = 0, seats_ = 0, working_ = 0;
};

using OpenMP = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
OpenMP openmp = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));

// Never destroyed, as detached workers wait on it when the process exits. A forked child has no workers, so it makes a
// new one.
Pool* pool = [] {
    pthread_atfork(nullptr, nullptr, [] {
        openmp = nullptr;
        pool = new Pool;
    });
    return new Pool;
}();

}  // namespace

void parallel(std::int64_t count, int threads, void (*unit)(void*, std::int64_t), void* context) {
    if (count <= 1 || threads <= 1) {
        for (std::int64_t i = 0; i < count; ++i) unit(context, i);
        return;
    }
    Units units(count, unit, context);
    const int used = static_cast<int>(count < threads ? count : threads);
    if (openmp)
        openmp([](void* self) { static_cast<Units*>(self)->work(); }, &units, static_cast<unsigned>(used), 0);
    else
        pool->run(units, used);
    units.finish();
}

void* thread_memory(std::int64_t bytes) {
    thread_local std::unique_ptr<Scratch> memory;
    thread_local std::int64_t size = 0;
    if (size < bytes) {
        size = 0;
        memory.reset();  // before the larger one is allocated
        memory = std::make_unique<Scratch>(bytes);
        size = bytes;
    }
    return memory->as<void>();
}

namespace {

// Linux backs memory of this alignment and size by huge pages if asked: fewer misses of the address cache.
constexpr std::align_val_t kHugePage{std::size_t{1} << 21};

bool is_huge(std::int64_t bytes) { return bytes >= 2 * static_cast<std::int64_t>(kHugePage); }

}  // namespace

Scratch::Scratch(std::int64_t bytes)
    : bytes_(bytes),
      memory_(::operator new(static_cast<std::size_t>(bytes), is_huge(bytes) ? kHugePage : std::align_val_t{64})) {
#ifdef MADV_HUGEPAGE
    if (is_huge(bytes)) madvise(memory_, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
#endif
}

Scratch::~Scratch() { ::operator delete(memory_, is_huge(bytes_) ? kHugePage : std::align_val_t{64}); }

}  // namespace metakern

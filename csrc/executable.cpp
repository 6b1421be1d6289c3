#include "executable.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>

#include "isa.h"

namespace metakern {
namespace {

struct CheckFailed {};

}  // namespace

// The arenas of parallel runs. All executables share them; they are freed with the last executable.
class Executable::Memory {
public:
    static std::shared_ptr<Memory> of_all() {
        static std::mutex mutex;
        static std::weak_ptr<Memory> all;
        const std::lock_guard<std::mutex> lock(mutex);
        std::shared_ptr<Memory> memory = all.lock();
        if (!memory) all = memory = std::make_shared<Memory>();
        return memory;
    }

    // Held while an executable runs. A run in another Python thread does not get the lock, and uses arenas of its own.
    std::unique_lock<std::mutex> lock() { return std::unique_lock<std::mutex>(mutex_, std::try_to_lock); }

    void* piece(std::size_t i, std::int64_t bytes) {
        if (pieces_.size() <= i) pieces_.resize(i + 1);
        Piece& piece = pieces_[i];
        if (piece.bytes < bytes) {
            piece.bytes = 0;
            piece.memory.reset();  // before the larger one is allocated
            piece.memory = std::make_unique<Scratch>(bytes);
            piece.bytes = bytes;
        }
        return piece.memory->as<void>();
    }

    void release() {
        const auto held = lock();
        if (held) pieces_.clear();
    }

private:
    struct Piece {
        std::unique_ptr<Scratch> memory;
        std::int64_t bytes = 0;
    };
    std::mutex mutex_;
    std::vector<Piece> pieces_;
};

Executable::Executable(std::int64_t bytes, int bases) : bytes_(bytes), bases_(bases), memory_(Memory::of_all()) {}

struct Executable::State {
    const std::uintptr_t* bases;
    int threads;
    bool bfloat16;
    const Isa& isa;

    void* at(const Place& place) const {
        return place.base < 0 ? nullptr : reinterpret_cast<void*>(bases[place.base] + static_cast<std::uintptr_t>(place.offset));
    }
};

namespace {

constexpr std::size_t kMostTensors = 32;
constexpr std::int64_t kWorthAThread = 1 << 15;  // an instruction of fewer elements runs on one thread

// The bytes of an element of tensor number `operand` of an instruction; the result is number 0.
std::int64_t element_bytes(int name, int type, int operand) {
    constexpr std::int64_t kBytes[] = {4, 8, 8, 1};
    if (name >= k_from_float32 && name <= k_from_bool && operand == 1) return kBytes[name - k_from_float32];
    const bool compares = name >= k_eq && name <= k_ge, chooses = name == k_where;
    return (compares && operand == 0) || (chooses && operand == 1) ? 1 : kBytes[type];
}

// The dimension to divide among threads, in which the result's stride is not 0. -1 if there is none, or if the instruction has
// too few elements to be worth a thread.
int dimension_to_split(const Instruction& instruction) {
    std::int64_t elements = 1;
    for (int d = 0; d < instruction.dims; ++d) elements *= instruction.sizes[d];
    const int last = instruction.dims - 1, d = instruction.reduced < 0 && instruction.reduced == -last ? last : 0;
    return elements >= kWorthAThread && instruction.reduced < instruction.dims && instruction.strides[0][d] ? d : -1;
}

bool within(std::int64_t value, std::int64_t high) { return value >= 0 && value < high; }

}  // namespace

void Executable::known(const Place& place, bool may_be_absent) const {
    if (place.base >= bases_ || place.base < -may_be_absent || place.offset < 0)
        throw std::invalid_argument("executable: a place must be in one of " + std::to_string(bases_) + " bases, got base " +
                                    std::to_string(place.base));
}

void Executable::kernel(std::size_t index, bool is_double, std::vector<Place> places, std::vector<std::int64_t> sizes,
                  std::vector<double> scalars) {
    const Entry& entry = isa_in_use().kernels.at(index);
    const Signature& signature = entry.signature;
    if (places.size() != signature.tensors() || places.size() > kMostTensors || sizes.size() != signature.sizes ||
        scalars.size() != static_cast<std::size_t>(entry.kernel.scalars))
        throw std::invalid_argument(std::string("executable: wrong numbers of arguments for ") + entry.kernel.name);
    for (std::size_t i = 0; i < places.size(); ++i) known(places[i], signature.optional(i));
    steps_.push_back([=](const State& state) {
        void* tensors[kMostTensors];
        for (std::size_t i = 0; i < places.size(); ++i) tensors[i] = state.at(places[i]);
        state.isa.kernels[index].kernel.run[is_double]({tensors, sizes.data(), scalars.data(), state.threads, state.bfloat16});
    });
}

void Executable::product(bool is_double, const std::array<Place, 4>& places, const std::array<std::int64_t, 4>& sizes,
                   const std::array<std::int64_t, 8>& s, double scale) {
    for (int i = 0; i < 4; ++i) known(places[i], i == 2);
    steps_.push_back([=](const State& state) {
        const Product product{state.at(places[0]), state.at(places[1]), state.at(places[2]), state.at(places[3]),
                              sizes[0], sizes[1], sizes[2], sizes[3],
                              {s[0], s[1], s[2]}, {s[3], s[4], s[5]}, {s[6], s[7]}, scale, state.bfloat16};
        state.isa.product.run[is_double](product, state.threads);
    });
}

void Executable::instruction(const std::string& name, int type, int reduced, const std::vector<Place>& places,
                const std::vector<std::int64_t>& sizes, const std::vector<std::vector<std::int64_t>>& strides,
                const std::array<double, 2>& scalars) {
    static constexpr struct {
        const char* name;
        std::size_t inputs;
    } kInstructions[] = {
#define METAKERN_NAME(name, inputs, ...) {#name, inputs},
        METAKERN_ELEMENTWISE(METAKERN_NAME) METAKERN_OTHER_INSTRUCTIONS(METAKERN_NAME)
#undef METAKERN_NAME
    };
    int number = 0;
    while (number < kInstructionNames && name != kInstructions[number].name) ++number;
    const auto refuse = [&](const char* what) { throw std::invalid_argument("executable: " + name + ": " + what); };
    if (number == kInstructionNames || type < 0 || type >= kElementTypes || !isa_in_use().instructions.run[number][type])
        refuse("there is no such instruction for the type");
    if (places.size() != kInstructions[number].inputs + 1 || strides.size() != places.size()) refuse("wrong number of tensors");
    const int dims = static_cast<int>(sizes.size()), operands = static_cast<int>(places.size());
    if (dims < 1 || dims > kMostDims || reduced > dims || reduced <= -dims) refuse("wrong number of dimensions");
    Instruction laid_out{};
    laid_out.dims = dims;
    laid_out.reduced = reduced;
    for (int d = 0; d < dims; ++d) laid_out.sizes[d] = sizes[d];
    std::array<std::int64_t, kMostOperands> bytes{};
    for (int i = 0; i < operands; ++i) {
        known(places[i]);
        if (static_cast<int>(strides[i].size()) != dims) refuse("wrong number of strides");
        for (int d = 0; d < dims; ++d) laid_out.strides[i][d] = strides[i][d];
        bytes[i] = element_bytes(number, type, i);
    }
    for (int i = 0; i < 2; ++i) laid_out.scalars[i] = scalars[i];
    const int split = dimension_to_split(laid_out);
    steps_.push_back([=](const State& state) {
        Instruction whole = laid_out;
        for (int i = 0; i < operands; ++i) whole.tensors[i] = state.at(places[i]);
        const auto run = state.isa.instructions.run[number][type];
        if (state.threads == 1 || split < 0) return run(whole);
        auto part = [&](std::int64_t i) {
            const std::int64_t size = whole.sizes[split], begin = size * i / state.threads;
            Instruction one = whole;
            one.sizes[split] = size * (i + 1) / state.threads - begin;
            for (int j = 0; j < operands; ++j)
                one.tensors[j] = static_cast<char*>(one.tensors[j]) + begin * whole.strides[j][split] * bytes[j];
            run(one);
        };
        parallel(
            state.threads, state.threads,
            [](void* context, std::int64_t i) { (*static_cast<decltype(part)*>(context))(i); }, &part);
    });
}

void Executable::take_rows(const std::array<Place, 3>& places, std::int64_t rows, std::int64_t table_rows, std::int64_t bytes) {
    for (const Place& place : places) known(place);
    steps_.push_back([=](const State& state) {
        char* out = static_cast<char*>(state.at(places[0]));
        const char* table = static_cast<const char*>(state.at(places[1]));
        const auto* index = static_cast<const std::int64_t*>(state.at(places[2]));
        for (std::int64_t i = 0; i < rows; ++i) {
            if (!within(index[i], table_rows)) throw CheckFailed();
            std::memcpy(out + i * bytes, table + index[i] * bytes, static_cast<std::size_t>(bytes));
        }
    });
}

void Executable::put_rows(const std::array<Place, 3>& places, std::int64_t rows, std::int64_t to_rows, std::int64_t bytes) {
    for (const Place& place : places) known(place);
    steps_.push_back([=](const State& state) {
        char* to = static_cast<char*>(state.at(places[0]));
        const char* from = static_cast<const char*>(state.at(places[1]));
        const auto* index = static_cast<const std::int64_t*>(state.at(places[2]));
        for (std::int64_t i = 0; i < rows; ++i) {
            if (!within(index[i], to_rows)) throw CheckFailed();
            std::memcpy(to + index[i] * bytes, from + i * bytes, static_cast<std::size_t>(bytes));
        }
    });
}

void Executable::add_rows(bool is_double, const std::array<Place, 3>& places, std::int64_t rows, std::int64_t to_rows,
                    std::int64_t D, double scale) {
    for (const Place& place : places) known(place);
    steps_.push_back([=](const State& state) {
        const auto* index = static_cast<const std::int64_t*>(state.at(places[2]));
        if (!std::all_of(index, index + rows, [=](std::int64_t i) { return within(i, to_rows); })) throw CheckFailed();
        state.isa.instructions.add_rows[is_double](state.at(places[0]), state.at(places[1]), index, rows, D, scale);
    });
}

void Executable::check(Place value, std::int64_t count, std::int64_t high, std::int64_t ignored) {
    known(value);
    steps_.push_back([=](const State& state) {
        const auto* values = static_cast<const std::int64_t*>(state.at(value));
        for (std::int64_t i = 0; i < count; ++i)
            if (!within(values[i], high) && values[i] != ignored) throw CheckFailed();
    });
}

void Executable::release() { memory_->release(); }

bool Executable::run(const std::vector<std::vector<std::uintptr_t>>& bases, int threads, bool bfloat16) {
    for (const auto& row : bases)
        if (static_cast<int>(row.size()) != bases_) throw std::invalid_argument("executable: wrong number of bases");
    struct Runs {
        Executable& executable;
        std::vector<std::vector<std::uintptr_t>> bases;
        int threads;
        bool bfloat16;
        std::atomic<bool> held{true}, memory_ran_out{false};
    } runs{*this, bases, bases.size() > 1 ? 1 : threads, bfloat16};
    const std::unique_lock<std::mutex> lock = memory_->lock();
    Memory own;
    for (std::size_t i = 0; i < bases.size(); ++i)
        runs.bases[i][0] = reinterpret_cast<std::uintptr_t>((lock ? *memory_ : own).piece(i, bytes_));
    parallel(
        static_cast<std::int64_t>(bases.size()), threads,
        [](void* context, std::int64_t i) {
            auto& runs = *static_cast<Runs*>(context);
            const State state{runs.bases[static_cast<std::size_t>(i)].data(), runs.threads, runs.bfloat16, isa_in_use()};
            try {  // no exception may leave a thread of OpenMP
                for (const auto& step : runs.executable.steps_) step(state);
            } catch (const CheckFailed&) {
                runs.held = false;
            } catch (const std::bad_alloc&) {
                runs.memory_ran_out = true;
            }
        },
        &runs);
    if (runs.memory_ran_out) throw std::bad_alloc();
    return runs.held;
}

}  // namespace metakern

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

Place::Place(std::int64_t base, std::int64_t offset) : base(base), offset(offset) {
    if (this->base != base || this->offset != offset)
        throw std::invalid_argument("executable: a place must fit a word, got base " + std::to_string(base) + " and offset " +
                                    std::to_string(offset));
}

Executable::Executable(std::int64_t bytes, int bases) : bytes_(bytes), bases_(bases), memory_(Memory::of_all()) {}

struct Executable::State {
    const std::uintptr_t* bases;
    int threads;
    bool bfloat16;
    const Isa& isa;
};

// The arguments of an instruction in a run, read one word after another.
class Executable::Arguments {
public:
    Arguments(const std::int64_t* words, const State& state) : next_(words), bases_(state.bases) {}

    template <class T>
    T word() {
        static_assert(sizeof(T) == sizeof *next_);
        T value;
        std::memcpy(&value, next_++, sizeof value);
        return value;
    }
    std::int64_t integer() { return *next_++; }
    double number() { return word<double>(); }
    void* tensor() {
        const auto place = word<Place>();
        return place.base < 0 ? nullptr : reinterpret_cast<void*>(bases_[place.base] + static_cast<std::uintptr_t>(place.offset));
    }
    const std::int64_t* integers(std::size_t count) {
        next_ += count;
        return next_ - count;
    }

private:
    const std::int64_t* next_;
    const std::uintptr_t* bases_;
};

template <class... Values>
void Executable::append(Function function, const Values&... values) {
    const std::size_t begin = code_.size();
    const auto add = [this](const auto& value) {
        static_assert(sizeof value == sizeof(std::int64_t));
        std::int64_t word;
        std::memcpy(&word, &value, sizeof word);
        code_.push_back(word);
    };
    add(std::int64_t{0});
    add(function);
    (std::for_each(std::begin(values), std::end(values), add), ...);
    code_[begin] = static_cast<std::int64_t>(code_.size() - begin);
}

namespace {

constexpr std::size_t kMostTensors = 32, kMostScalars = 4;
constexpr std::int64_t kWorthAThread = 1 << 15;  // an instruction of fewer elements runs on one thread

struct Definition {
    const char* name;
    std::size_t inputs;
    ElementType result, first_input;
};
constexpr Definition kInstructions[] = {
#define METAKERN_ELEMENTWISE_NAME(name, inputs, formula) {#name, inputs, kOwnType, kOwnType},
#define METAKERN_OTHER_NAME(name, inputs, result, first_input) {#name, inputs, result, first_input},
    METAKERN_ELEMENTWISE(METAKERN_ELEMENTWISE_NAME) METAKERN_OTHER_INSTRUCTIONS(METAKERN_OTHER_NAME)
#undef METAKERN_ELEMENTWISE_NAME
#undef METAKERN_OTHER_NAME
};

// The bytes of an element of tensor number `operand` of an instruction; the result is number 0.
std::int64_t element_bytes(int name, int type, int operand) {
    constexpr std::int64_t kBytes[] = {4, 8, 8, 1};
    const Definition& definition = kInstructions[name];
    const ElementType fixed = operand == 0 ? definition.result : operand == 1 ? definition.first_input : kOwnType;
    return kBytes[fixed == kOwnType ? type : fixed];
}

// The dimension to divide among threads, in which the result's stride is not 0. -1 if there is none, or if the instruction has
// too few elements to be worth a thread.
int dimension_to_split(const Instruction& instruction) {
    std::int64_t elements = 1;
    for (int d = 0; d < instruction.dims; ++d) elements *= instruction.sizes[d];
    const int last = instruction.dims - 1, d = instruction.reduced < 0 && instruction.reduced == -last ? last : 0;
    return elements >= kWorthAThread && instruction.reduced < instruction.dims && instruction.strides[0][d] ? d : -1;
}

// What an elementwise instruction or a sum is, in one word.
struct Header {
    std::uint8_t name, type, operands, dims;
    std::int16_t reduced, split;
};
static_assert(kInstructionNames <= 256);

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
    const std::size_t count = static_cast<std::size_t>(entry.kernel.scalars);
    if (places.size() != signature.tensors() || places.size() > kMostTensors || sizes.size() != signature.sizes ||
        scalars.size() != count || count > kMostScalars)
        throw std::invalid_argument(std::string("executable: wrong numbers of arguments for ") + entry.kernel.name);
    for (std::size_t i = 0; i < places.size(); ++i) known(places[i], signature.optional(i));
    const auto run = [](const State& state, Arguments next) {
        const Entry& entry = state.isa.kernels[static_cast<std::size_t>(next.integer())];
        const bool is_double = next.integer();
        void* tensors[kMostTensors];
        double scalars[kMostScalars];
        for (std::size_t i = 0; i < entry.signature.tensors(); ++i) tensors[i] = next.tensor();
        const std::int64_t* sizes = next.integers(entry.signature.sizes);
        for (int i = 0; i < entry.kernel.scalars; ++i) scalars[i] = next.number();
        entry.kernel.run[is_double]({tensors, sizes, scalars, state.threads, state.bfloat16});
    };
    append(run, std::array{static_cast<std::int64_t>(index), std::int64_t{is_double}}, places, sizes, scalars);
}

void Executable::product(bool is_double, const std::array<Place, 6>& places, const std::array<std::int64_t, 4>& sizes,
                   const std::array<std::int64_t, 8>& strides, double scale, std::int64_t ignored) {
    for (int i = 0; i < 6; ++i) known(places[i], i == 2 || i >= 4);
    const auto run = [](const State& state, Arguments next) {
        const bool is_double = next.integer();
        Product product{};
        product.a = next.tensor();
        product.b = next.tensor();
        product.add = next.tensor();
        product.c = next.tensor();
        product.rows = static_cast<const std::int64_t*>(next.tensor());
        product.terms = static_cast<const std::int64_t*>(next.tensor());
        for (std::int64_t* size : {&product.T, &product.M, &product.N, &product.K}) *size = next.integer();
        for (std::int64_t& stride : product.a_strides) stride = next.integer();
        for (std::int64_t& stride : product.b_strides) stride = next.integer();
        for (std::int64_t& stride : product.add_strides) stride = next.integer();
        product.scale = next.number();
        product.ignored = next.integer();
        product.bfloat16 = state.bfloat16;
        state.isa.product.run[is_double](product, state.threads);
    };
    append(run, std::array{std::int64_t{is_double}}, places, sizes, strides, std::array{scale}, std::array{ignored});
}

void Executable::instruction(const std::string& name, int type, int reduced, const std::vector<Place>& places,
                const std::vector<std::int64_t>& sizes, const std::vector<std::vector<std::int64_t>>& strides,
                const std::array<double, 2>& scalars) {
    int number = 0;
    while (number < kInstructionNames && name != kInstructions[number].name) ++number;
    const auto refuse = [&](const char* what) { throw std::invalid_argument("executable: " + name + ": " + what); };
    if (number == kInstructionNames || type < 0 || type >= kElementTypes || !isa_in_use().instructions.run[number][type])
        refuse("there is no such instruction for the type");
    if (places.size() != kInstructions[number].inputs + 1 || strides.size() != places.size()) refuse("wrong number of tensors");
    const int dims = static_cast<int>(sizes.size()), operands = static_cast<int>(places.size());
    if (dims < 1 || dims > kMostDims || reduced > dims || reduced <= -dims) refuse("wrong number of dimensions");
    Instruction laid_out;
    laid_out.dims = dims;
    laid_out.reduced = reduced;
    std::copy(sizes.begin(), sizes.end(), laid_out.sizes);
    std::vector<std::int64_t> all_strides;
    for (int i = 0; i < operands; ++i) {
        known(places[i]);
        if (static_cast<int>(strides[i].size()) != dims) refuse("wrong number of strides");
        std::copy(strides[i].begin(), strides[i].end(), laid_out.strides[i]);
        all_strides.insert(all_strides.end(), strides[i].begin(), strides[i].end());
    }
    const int split = dimension_to_split(laid_out);
    const Header header{static_cast<std::uint8_t>(number), static_cast<std::uint8_t>(type),
                        static_cast<std::uint8_t>(operands), static_cast<std::uint8_t>(dims),
                        static_cast<std::int16_t>(reduced), static_cast<std::int16_t>(split)};
    const auto run = [](const State& state, Arguments next) {
        const auto header = next.word<Header>();
        Instruction whole;
        whole.dims = header.dims;
        whole.reduced = header.reduced;
        for (int i = 0; i < header.operands; ++i) whole.tensors[i] = next.tensor();
        for (int d = 0; d < header.dims; ++d) whole.sizes[d] = next.integer();
        for (int i = 0; i < header.operands; ++i)
            for (int d = 0; d < header.dims; ++d) whole.strides[i][d] = next.integer();
        for (double& scalar : whole.scalars) scalar = next.number();
        const auto run = state.isa.instructions.run[header.name][header.type];
        if (state.threads == 1 || header.split < 0) return run(whole);
        auto part = [&](std::int64_t i) {
            const std::int64_t size = whole.sizes[header.split], begin = size * i / state.threads;
            Instruction one = whole;
            one.sizes[header.split] = size * (i + 1) / state.threads - begin;
            for (int j = 0; j < header.operands; ++j)
                one.tensors[j] = static_cast<char*>(one.tensors[j]) +
                                 begin * whole.strides[j][header.split] * element_bytes(header.name, header.type, j);
            run(one);
        };
        parallel(
            state.threads, state.threads,
            [](void* context, std::int64_t i) { (*static_cast<decltype(part)*>(context))(i); }, &part);
    };
    append(run, std::array{header}, places, sizes, all_strides, scalars);
}

void Executable::take_rows(const std::array<Place, 3>& places, std::int64_t rows, std::int64_t table_rows, std::int64_t bytes) {
    for (const Place& place : places) known(place);
    const auto run = [](const State&, Arguments next) {
        char* out = static_cast<char*>(next.tensor());
        const char* table = static_cast<const char*>(next.tensor());
        const auto* index = static_cast<const std::int64_t*>(next.tensor());
        const std::int64_t rows = next.integer(), table_rows = next.integer(), bytes = next.integer();
        for (std::int64_t i = 0; i < rows; ++i) {
            if (!within(index[i], table_rows)) throw CheckFailed();
            std::memcpy(out + i * bytes, table + index[i] * bytes, static_cast<std::size_t>(bytes));
        }
    };
    append(run, places, std::array{rows, table_rows, bytes});
}

void Executable::put_rows(const std::array<Place, 3>& places, std::int64_t rows, std::int64_t to_rows, std::int64_t bytes) {
    for (const Place& place : places) known(place);
    const auto run = [](const State&, Arguments next) {
        char* to = static_cast<char*>(next.tensor());
        const char* from = static_cast<const char*>(next.tensor());
        const auto* index = static_cast<const std::int64_t*>(next.tensor());
        const std::int64_t rows = next.integer(), to_rows = next.integer(), bytes = next.integer();
        for (std::int64_t i = 0; i < rows; ++i) {
            if (!within(index[i], to_rows)) throw CheckFailed();
            std::memcpy(to + index[i] * bytes, from + i * bytes, static_cast<std::size_t>(bytes));
        }
    };
    append(run, places, std::array{rows, to_rows, bytes});
}

void Executable::add_rows(bool is_double, const std::array<Place, 3>& places, std::int64_t rows, std::int64_t to_rows,
                    std::int64_t D, double scale) {
    for (const Place& place : places) known(place);
    const auto run = [](const State& state, Arguments next) {
        void* to = next.tensor();
        const void* from = next.tensor();
        const auto* index = static_cast<const std::int64_t*>(next.tensor());
        const std::int64_t rows = next.integer(), to_rows = next.integer(), D = next.integer();
        const bool is_double = next.integer();
        if (!std::all_of(index, index + rows, [=](std::int64_t i) { return within(i, to_rows); })) throw CheckFailed();
        state.isa.instructions.add_rows[is_double](to, from, index, rows, D, next.number());
    };
    append(run, places, std::array{rows, to_rows, D, std::int64_t{is_double}}, std::array{scale});
}

void Executable::check(const std::array<Place, 1>& value, std::int64_t count, std::int64_t high, std::int64_t ignored) {
    known(value[0]);
    const auto run = [](const State&, Arguments next) {
        const auto* values = static_cast<const std::int64_t*>(next.tensor());
        const std::int64_t count = next.integer(), high = next.integer(), ignored = next.integer();
        for (std::int64_t i = 0; i < count; ++i)
            if (!within(values[i], high) && values[i] != ignored) throw CheckFailed();
    };
    append(run, value, std::array{count, high, ignored});
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
                const std::vector<std::int64_t>& code = runs.executable.code_;
                for (std::size_t at = 0; at < code.size(); at += static_cast<std::size_t>(code[at])) {
                    Arguments next(&code[at + 1], state);
                    const auto function = next.word<Function>();
                    function(state, next);
                }
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

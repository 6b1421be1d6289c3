// An executable: a lowered program as a list of instructions, whose temporaries have fixed offsets in one arena.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "parallel.h"
#include "instructions.h"

namespace metakern {

// Where a tensor begins: `offset` bytes after the address of `base`. Base 0 is the arena, base -1 an absent tensor;
// each run gives the addresses of the others. A place is one word, as a program of many inner steps has very many.
struct Place {
    static constexpr int kOffsetBits = 44;
    std::int64_t base : 64 - kOffsetBits, offset : kOffsetBits;

    Place() = default;
    Place(std::int64_t base, std::int64_t offset);
};

class Executable {
public:
    Executable(std::int64_t bytes, int bases);

    // Each of these appends an instruction. The lowering has checked shapes and layouts; bases and counts are checked
    // here.
    void kernel(std::size_t index, bool is_double, std::vector<Place> places, std::vector<std::int64_t> sizes,
                std::vector<double> scalars);
    void product(bool is_double, const std::array<Place, 6>& places, const std::array<std::int64_t, 4>& sizes,
                 const std::array<std::int64_t, 8>& strides, double scale, std::int64_t ignored);
    void instruction(const std::string& name, int type, int reduced, const std::vector<Place>& places,
              const std::vector<std::int64_t>& sizes, const std::vector<std::vector<std::int64_t>>& strides,
              const std::array<double, 2>& scalars);
    // out[i] = table[index[i]] for rows of `bytes` bytes. Stops the run if an index is not in [0, table_rows).
    void take_rows(const std::array<Place, 3>& out_table_index, std::int64_t rows, std::int64_t table_rows, std::int64_t bytes);
    // to[index[i]] = from[i] for rows of `bytes` bytes; of two equal indices the later row stays. Stops the run as add_rows.
    void put_rows(const std::array<Place, 3>& to_from_index, std::int64_t rows, std::int64_t to_rows, std::int64_t bytes);
    // to[index[i]] += scale from[i] for rows of D elements. Stops the run if an index is not in [0, to_rows).
    void add_rows(bool is_double, const std::array<Place, 3>& to_from_index, std::int64_t rows, std::int64_t to_rows,
                  std::int64_t D, double scale);
    // Stops the run if an integer is neither in [0, high) nor equal to `ignored`.
    void check(const std::array<Place, 1>& value, std::int64_t count, std::int64_t high, std::int64_t ignored);

    // Runs the instructions once for each row of `bases`, in parallel; the first entry of a row is replaced by the
    // arena. With `bfloat16`, products of float32 matrices round their operands (product.h). Returns whether all checks
    // held. The results of a run that stopped are incomplete.
    bool run(const std::vector<std::vector<std::uintptr_t>>& bases, int threads, bool bfloat16);

    // The bytes of the arena, and those of the instructions.
    std::int64_t bytes() const { return bytes_; }
    std::int64_t size() const { return static_cast<std::int64_t>(code_.capacity() * sizeof(code_[0])); }

    // Frees the arenas of all executables, unless one is running. The next run allocates again.
    void release();

private:
    class Memory;
    struct State;
    class Arguments;
    using Function = void (*)(const State&, Arguments);

    void known(const Place& place, bool may_be_absent = false) const;
    template <class... Values>
    void append(Function function, const Values&... values);

    std::int64_t bytes_;
    int bases_;
    // The instructions, one after another, in words of eight bytes: the number of its words, the function that runs it,
    // and its arguments in the order in which this function reads them.
    std::vector<std::int64_t> code_;
    std::shared_ptr<Memory> memory_;
};

}  // namespace metakern

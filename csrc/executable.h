// An executable: instructions on memory that was laid out beforehand, run without Python.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "parallel.h"
#include "pass.h"

namespace metakern {

// Where a tensor begins: so many bytes into a base. Base 0 is the arena, base -1 an absent tensor; the addresses of the others
// are given at each run.
struct Place {
    int base;
    std::int64_t offset;
};

class Executable {
public:
    Executable(std::int64_t bytes, int bases);

    // The instructions, in their order. Whoever lowers a program has checked shapes and layouts; bases and counts are checked here.
    void kernel(std::size_t index, bool is_double, std::vector<Place> places, std::vector<std::int64_t> sizes,
                std::vector<double> scalars);
    void product(bool is_double, const std::array<Place, 4>& places, const std::array<std::int64_t, 4>& sizes,
                 const std::array<std::int64_t, 8>& strides, double scale);
    void pass(const std::string& name, int type, int reduced, const std::vector<Place>& places,
              const std::vector<std::int64_t>& sizes, const std::vector<std::vector<std::int64_t>>& strides,
              const std::array<double, 2>& scalars);
    // out[i] = table[index[i]], rows of so many bytes.
    void take_rows(const std::array<Place, 3>& out_table_index, std::int64_t rows, std::int64_t table_rows, std::int64_t bytes);
    // to[index[i]] += scale from[i], rows of D elements.
    void add_rows(bool is_double, const std::array<Place, 3>& to_from_index, std::int64_t rows, std::int64_t to_rows,
                  std::int64_t D, double scale);
    // Stops the run where an integer is not in [0, high), nor `ignored`.
    void check(Place value, std::int64_t count, std::int64_t high, std::int64_t ignored);

    // One run for each row of bases, side by side; whether all checks held. Results of a run that stops are not complete.
    bool run(const std::vector<std::vector<std::uintptr_t>>& bases, int threads);

    std::int64_t bytes() const { return bytes_; }

    // Gives back the memory of all executables, until one runs.
    void release();

private:
    class Memory;
    struct State;
    void known(const Place& place, bool may_be_absent = false) const;

    std::int64_t bytes_;
    int bases_;
    std::vector<std::function<void(const State&)>> steps_;
    std::shared_ptr<Memory> memory_;
};

}  // namespace metakern

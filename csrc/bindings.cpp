// Python's way in: kernels by number, tensors by address. Nothing is called before the counts, sizes and addresses agree.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernel.h"

namespace py = pybind11;

// The files of csrc/cpu, each compiled once for every instruction set.
#define METAKERN_FILES(X) X(cross_entropy) X(gelu) X(layer_norm) X(rms_norm) X(rope) X(silu) X(swiglu)

namespace metakern {

#define METAKERN_DECLARE(file) extern const Kernel file##_kernels[];
#define METAKERN_ENTER(file) file##_kernels,
#define METAKERN_TABLE(isa)                                               \
    namespace isa {                                                       \
    METAKERN_FILES(METAKERN_DECLARE)                                      \
    const Kernel* const files[] = {METAKERN_FILES(METAKERN_ENTER)};       \
    }

#ifdef METAKERN_HAS_avx512
METAKERN_TABLE(avx512)
#endif
#ifdef METAKERN_HAS_avx2
METAKERN_TABLE(avx2)
#endif
METAKERN_TABLE(baseline)

namespace {

// A kernel and what its signature says of its tensors.
struct Entry {
    Kernel kernel;
    std::vector<bool> optional;
    std::size_t sizes = 0;

    explicit Entry(const Kernel& k) : kernel(k) {
        std::string seen;
        for (const char* c = k.signature; *c; ++c) {
            if (*c != ':') continue;
            while (*++c && *c != ' ' && *c != '?' && *c != 'i')
                if (seen.find(*c) == std::string::npos) seen += *c;
            optional.push_back(*c == '?');
            if (!*c) break;
        }
        sizes = seen.size();
    }
};

using Table = std::vector<Entry>;

template <std::size_t n>
Table table(const Kernel* const (&files)[n]) {
    Table entries;
    for (const Kernel* file : files)
        for (; file->name; ++file) entries.emplace_back(*file);
    return entries;
}

// The instruction sets that this machine has, best first.
const std::vector<std::pair<std::string, Table>>& isas() {
    static const auto* const list = [] {
        auto* found = new std::vector<std::pair<std::string, Table>>;
#ifdef METAKERN_HAS_avx512
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            found->emplace_back("avx512", table(avx512::files));
#endif
#ifdef METAKERN_HAS_avx2
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
            found->emplace_back("avx2", table(avx2::files));
#endif
        found->emplace_back("baseline", table(baseline::files));
        return found;
    }();
    return *list;
}

std::atomic<std::size_t> chosen{0};

std::string isa() { return isas()[chosen].first; }

std::vector<std::string> isa_names() {
    std::vector<std::string> names;
    for (const auto& each : isas()) names.push_back(each.first);
    return names;
}

void set_isa(const std::string& name) {
    for (std::size_t i = 0; i < isas().size(); ++i)
        if (isas()[i].first == name) return void(chosen = i);
    throw std::invalid_argument("isa must be one of this machine's, got '" + name + "'");
}

std::vector<std::pair<std::string, std::string>> signatures() {
    std::vector<std::pair<std::string, std::string>> all;
    for (const Entry& entry : isas()[0].second) all.emplace_back(entry.kernel.name, entry.kernel.signature);
    return all;
}

void call(std::size_t index, bool is_double, const std::vector<std::uintptr_t>& tensors,
          const std::vector<std::int64_t>& sizes, const std::vector<double>& scalars, int threads) {
    const Table& kernels = isas()[chosen].second;
    if (index >= kernels.size()) throw std::out_of_range("no kernel has the number " + std::to_string(index));
    const Entry& entry = kernels[index];
    const auto refuse = [&](const char* what, std::size_t got) {
        throw std::invalid_argument(std::string(entry.kernel.name) + ": " + what + ", got " + std::to_string(got));
    };
    if (tensors.size() != entry.optional.size()) refuse("wrong number of tensors", tensors.size());
    if (sizes.size() != entry.sizes) refuse("wrong number of sizes", sizes.size());
    if (scalars.size() != static_cast<std::size_t>(entry.kernel.scalars)) refuse("wrong number of scalars", scalars.size());
    if (std::any_of(sizes.begin(), sizes.end(), [](std::int64_t size) { return size < 0; }))
        refuse("sizes must not be negative", 0);
    const bool empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
    for (std::size_t i = 0; i < tensors.size(); ++i)
        if (!tensors[i] && !entry.optional[i] && !empty) refuse("a tensor has no memory, tensor number", i);

    std::vector<void*> addresses;
    for (const std::uintptr_t address : tensors) addresses.push_back(reinterpret_cast<void*>(address));
    py::gil_scoped_release released;
    entry.kernel.run[is_double]({addresses.data(), sizes.data(), scalars.data(), threads});
}

}  // namespace
}  // namespace metakern

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
    module.doc() = "metakern's kernels for CPUs";
    module.def("isa", &metakern::isa, "The instruction set in use.");
    module.def("isas", &metakern::isa_names, "The instruction sets of this machine, best first.");
    module.def("set_isa", &metakern::set_isa, py::arg("name"), "Use the kernels of another instruction set.");
    module.def("signatures", &metakern::signatures, "(name, signature) of every kernel; its place is its number.");
    module.def("call", &metakern::call, py::arg("index"), py::arg("is_double"), py::arg("tensors"), py::arg("sizes"),
               py::arg("scalars"), py::arg("threads"), "Run a kernel. metakern._native.call checks what it is given.");
}

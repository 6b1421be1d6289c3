// Python's way in: kernels by number, tensors by address. Nothing is called before the counts, sizes and addresses agree.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernel.h"
#include "product.h"

namespace py = pybind11;

// The files of csrc/cpu, each compiled once for every instruction set.
#define METAKERN_FILES(X) \
    X(attention) X(cross_entropy) X(gelu) X(gru) X(layer_norm) X(lstm) X(rms_norm) X(rnn) X(rope) X(silu) X(swiglu)

namespace metakern {

#define METAKERN_DECLARE(file) extern const Kernel file##_kernels[];
#define METAKERN_ENTER(file) file##_kernels,
#define METAKERN_TABLE(isa)                                               \
    namespace isa {                                                       \
    METAKERN_FILES(METAKERN_DECLARE)                                      \
    extern const ProductKernels product_kernels;                          \
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
            while (*++c && *c != ' ' && *c != '?' && *c != 'i' && *c != '=')
                if ((*c < '0' || *c > '9') && seen.find(*c) == std::string::npos) seen += *c;
            if (*c == 'i') ++c;
            optional.push_back(*c == '?');
            if (!*c) break;
        }
        sizes = seen.size();
    }
};

// The kernels of an instruction set.
struct Isa {
    std::string name;
    std::vector<Entry> kernels;
    ProductKernels product;
};

template <std::size_t n>
Isa isa_of(const char* name, const Kernel* const (&files)[n], ProductKernels product) {
    Isa isa{name, {}, product};
    for (const Kernel* file : files)
        for (; file->name; ++file) isa.kernels.emplace_back(*file);
    return isa;
}

// The instruction sets that this machine has, best first.
const std::vector<Isa>& isas() {
    static const auto* const list = [] {
        auto* found = new std::vector<Isa>;
#ifdef METAKERN_HAS_avx512
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            found->push_back(isa_of("avx512", avx512::files, avx512::product_kernels));
#endif
#ifdef METAKERN_HAS_avx2
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
            found->push_back(isa_of("avx2", avx2::files, avx2::product_kernels));
#endif
        found->push_back(isa_of("baseline", baseline::files, baseline::product_kernels));
        return found;
    }();
    return *list;
}

std::atomic<std::size_t> chosen{0};

std::string isa() { return isas()[chosen].name; }

bool is_intel() {
#if defined(__x86_64__)
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

std::vector<std::string> isa_names() {
    std::vector<std::string> names;
    for (const auto& each : isas()) names.push_back(each.name);
    return names;
}

void set_isa(const std::string& name) {
    for (std::size_t i = 0; i < isas().size(); ++i)
        if (isas()[i].name == name) return void(chosen = i);
    throw std::invalid_argument("isa must be one of this machine's, got '" + name + "'");
}

std::vector<std::pair<std::string, std::string>> signatures() {
    std::vector<std::pair<std::string, std::string>> all;
    for (const Entry& entry : isas()[0].kernels) all.emplace_back(entry.kernel.name, entry.kernel.signature);
    return all;
}

void call(std::size_t index, bool is_double, const std::vector<std::uintptr_t>& tensors,
          const std::vector<std::int64_t>& sizes, const std::vector<double>& scalars, int threads) {
    const std::vector<Entry>& kernels = isas()[chosen].kernels;
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

// Sizes T, M, N, K and the strides of product.h; metakern._native.product has checked them.
void product(bool is_double, const std::array<std::uintptr_t, 4>& addresses, const std::array<std::int64_t, 4>& sizes,
             const std::array<std::int64_t, 8>& strides, double scale, int threads) {
    const auto at = [&](int i) { return reinterpret_cast<void*>(addresses[i]); };
    const auto& s = strides;
    const Product p{at(0),    at(1),    at(2), at(3), sizes[0], sizes[1], sizes[2], sizes[3], {s[0], s[1], s[2]},
                    {s[3], s[4], s[5]}, {s[6], s[7]}, scale};
    py::gil_scoped_release released;
    isas()[chosen].product.run[is_double](p, threads);
}

}  // namespace
}  // namespace metakern

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
    module.doc() = "metakern's kernels for CPUs";
    module.def("isa", &metakern::isa, "The instruction set in use.");
    module.def("is_intel", &metakern::is_intel, "Whether the CPU is Intel's.");
    module.def("isas", &metakern::isa_names, "The instruction sets of this machine, best first.");
    module.def("set_isa", &metakern::set_isa, py::arg("name"), "Use the kernels of another instruction set.");
    module.def("signatures", &metakern::signatures, "(name, signature) of every kernel; its place is its number.");
    module.def("call", &metakern::call, py::arg("index"), py::arg("is_double"), py::arg("tensors"), py::arg("sizes"),
               py::arg("scalars"), py::arg("threads"), "Run a kernel. metakern._native.call checks what it is given.");
    module.def("product", &metakern::product, py::arg("is_double"), py::arg("addresses"), py::arg("sizes"),
               py::arg("strides"), py::arg("scale"), py::arg("threads"), "A batched matrix product; metakern._native.product checks.");
}

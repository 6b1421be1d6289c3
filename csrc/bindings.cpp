// The Python module of the C++ kernels. A kernel is called by its number, with tensors by address; the numbers of
// tensors, sizes and scalars, and the addresses, are checked before it runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "executable.h"

namespace py = pybind11;

namespace metakern {
namespace {

std::vector<std::string> isa_names() {
    std::vector<std::string> names;
    for (const auto& each : isas()) names.push_back(each.name);
    return names;
}

// (name, inputs, outputs) of every kernel, in the order of their numbers.
py::list signatures() {
    const auto arguments = [](const std::vector<Argument>& all) {
        py::list list;
        for (const Argument& a : all) list.append(py::make_tuple(a.name, a.dims, a.indices, a.optional, a.given_with, a.memory));
        return list;
    };
    py::list list;
    for (const Entry& entry : isas()[0].kernels)
        list.append(py::make_tuple(entry.kernel.name, arguments(entry.signature.inputs), arguments(entry.signature.outputs)));
    return list;
}

void call(std::size_t index, bool is_double, const std::vector<std::uintptr_t>& tensors,
          const std::vector<std::int64_t>& sizes, const std::vector<double>& scalars, int threads, bool bfloat16) {
    const std::vector<Entry>& kernels = isa_in_use().kernels;
    if (index >= kernels.size()) throw std::out_of_range("no kernel has the number " + std::to_string(index));
    const Entry& entry = kernels[index];
    const auto refuse = [&](const char* what, std::size_t got) {
        throw std::invalid_argument(std::string(entry.kernel.name) + ": " + what + ", got " + std::to_string(got));
    };
    if (tensors.size() != entry.signature.tensors()) refuse("wrong number of tensors", tensors.size());
    if (sizes.size() != entry.signature.sizes) refuse("wrong number of sizes", sizes.size());
    if (scalars.size() != static_cast<std::size_t>(entry.kernel.scalars)) refuse("wrong number of scalars", scalars.size());
    if (std::any_of(sizes.begin(), sizes.end(), [](std::int64_t size) { return size < 0; }))
        throw std::invalid_argument(std::string(entry.kernel.name) + ": sizes must not be negative");
    const bool empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
    for (std::size_t i = 0; i < tensors.size(); ++i)
        if (!tensors[i] && !entry.signature.optional(i) && !empty) throw std::invalid_argument(std::string(entry.kernel.name) + ": tensor " + std::to_string(i) + " has no memory");

    std::vector<void*> addresses;
    for (const std::uintptr_t address : tensors) addresses.push_back(reinterpret_cast<void*>(address));
    py::gil_scoped_release released;
    entry.kernel.run[is_double]({addresses.data(), sizes.data(), scalars.data(), threads, bfloat16});
}

// Sizes T, M, N, K and the strides of product.h; metakern.native.product has checked them.
void product(bool is_double, const std::array<std::uintptr_t, 4>& addresses, const std::array<std::int64_t, 4>& sizes,
             const std::array<std::int64_t, 8>& strides, double scale, int threads, bool bfloat16) {
    const auto at = [&](int i) { return reinterpret_cast<void*>(addresses[i]); };
    const auto& s = strides;
    const Product p{at(0),    at(1),    at(2), at(3), sizes[0], sizes[1], sizes[2], sizes[3], {s[0], s[1], s[2]},
                    {s[3], s[4], s[5]}, {s[6], s[7]}, scale, bfloat16};
    py::gil_scoped_release released;
    isa_in_use().product.run[is_double](p, threads);
}

// The rate of multiply-adds in FLOP/s, measured over at least `flop` of them.
double peak(const std::string& dtype, double flop, int threads) {
    const std::array<const char*, 3> dtypes{"float32", "float64", "bfloat16"};
    const auto found = std::find(dtypes.begin(), dtypes.end(), dtype);
    const auto run = found == dtypes.end() ? nullptr : isa_in_use().peak.run[found - dtypes.begin()];
    if (!run) throw std::invalid_argument("peak: dtype must have multiply-adds on this processor, got " + dtype);
    if (!(flop > 0 && flop < 1e18)) throw std::invalid_argument("peak: flop must be between 0 and 1e18, got " + std::to_string(flop));
    py::gil_scoped_release released;
    const auto start = std::chrono::steady_clock::now();
    const double done = run(flop, threads);
    return done / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace
}  // namespace metakern

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
    module.doc() = "metakern's kernels for CPUs";
    module.def("isa", [] { return metakern::isa_in_use().name; }, "The instruction set in use.");
    module.def("isas", &metakern::isa_names, "The instruction sets of this machine, best first.");
    module.def("set_isa", &metakern::set_isa, py::arg("name"), "Use the kernels of another instruction set.");
    module.def("peak", &metakern::peak, py::arg("dtype"), py::arg("flop"), py::arg("threads"),
               "The rate, in FLOP/s, of multiply-adds in registers, on all threads at once.");
    module.def("signatures", &metakern::signatures, "(name, inputs, outputs) of every kernel; its place is its number. An argument is (name, dims, indices, optional, given_with, memory), as csrc/signature.h says.");
    module.def("call", &metakern::call, py::arg("index"), py::arg("is_double"), py::arg("tensors"), py::arg("sizes"),
               py::arg("scalars"), py::arg("threads"), py::arg("bfloat16"), "Run a kernel. metakern.native.call checks what it is given.");
    module.def("product", &metakern::product, py::arg("is_double"), py::arg("addresses"), py::arg("sizes"),
               py::arg("strides"), py::arg("scale"), py::arg("threads"), py::arg("bfloat16"), "A batched matrix product; metakern.native.product checks.");

    py::dict elementwise;
#define METAKERN_ENTRY(name, inputs, formula) elementwise[#name] = inputs;
    METAKERN_ELEMENTWISE(METAKERN_ENTRY)
#undef METAKERN_ENTRY
    module.attr("elementwise") = elementwise;  // the elementwise instructions of an Executable, with their numbers of inputs

    using metakern::Place;
    using metakern::Executable;
    py::class_<Place>(module, "Place").def(py::init<int, std::int64_t>());
    py::class_<Executable>(module, "Executable", "Kernel calls on memory laid out beforehand; metakern.meta.capture.lowering makes them.")
        .def(py::init<std::int64_t, int>(), py::arg("bytes"), py::arg("bases"))
        .def("kernel", &Executable::kernel)
        .def("product", &Executable::product)
        .def("instruction", &Executable::instruction)
        .def("take_rows", &Executable::take_rows)
        .def("put_rows", &Executable::put_rows)
        .def("add_rows", &Executable::add_rows)
        .def("check", &Executable::check)
        .def_property_readonly("bytes", &Executable::bytes)
        .def_property_readonly("size", &Executable::size)
        .def("release", &Executable::release)
        .def("run", &Executable::run, py::arg("bases"), py::arg("threads"), py::arg("bfloat16"), py::call_guard<py::gil_scoped_release>());
}

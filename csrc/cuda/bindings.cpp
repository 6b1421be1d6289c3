// The Python module of the CUDA kernels. A kernel is called by its number, with tensors by address, which
// metakern.native.call has checked.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernel.h"

namespace py = pybind11;

namespace metakern::cuda {

extern const Kernel rnn_kernels[], gru_kernels[], lstm_kernels[];

namespace {

const std::vector<Kernel>& kernels() {
    static const auto* const list = [] {
        auto* found = new std::vector<Kernel>;
        for (const Kernel* file : {rnn_kernels, gru_kernels, lstm_kernels})
            for (; file->name; ++file) found->push_back(*file);
        return found;
    }();
    return *list;
}

std::vector<std::string> names() {
    std::vector<std::string> all;
    for (const Kernel& kernel : kernels()) all.emplace_back(kernel.name);
    return all;
}

// Nothing here waits for the GPU. Memory from `allocate` is safe all the same, as only later work of the stream reuses
// it.
py::dict call(std::size_t index, bool is_bf16, const std::vector<std::uintptr_t>& tensors, std::vector<std::int64_t> sizes,
          std::vector<double> scalars, std::uintptr_t stream, const std::function<std::uintptr_t(std::size_t)>& allocate) {
    std::vector<void*> addresses;
    for (const std::uintptr_t address : tensors) addresses.push_back(reinterpret_cast<void*>(address));
    if (sizes.size() != 4) throw std::invalid_argument("a recurrence has four sizes, got " + std::to_string(sizes.size()));
    const Plan plan = kernels().at(index).run[is_bf16]({std::move(addresses), std::move(sizes), std::move(scalars), reinterpret_cast<void*>(stream),
                                      [&](std::size_t bytes) { return reinterpret_cast<void*>(allocate(bytes)); }});
    using namespace py::literals;
    const char* const meetings[] = {"alone", "cluster", "counter"};
    return py::dict("meeting"_a = meetings[static_cast<int>(plan.meeting)], "blocks"_a = plan.blocks, "units"_a = plan.units,
                    "rows"_a = plan.rows, "parts"_a = plan.parts, "groups"_a = plan.groups, "splits"_a = plan.splits,
                    "iterations"_a = plan.iterations, "resident"_a = plan.resident, "chunk"_a = plan.chunk,
                    "shared"_a = plan.shared);
}

}  // namespace
}  // namespace metakern::cuda

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
    module.doc() = "metakern's kernels for NVIDIA GPUs";
    module.def("names", &metakern::cuda::names, "The name of every kernel; its place is its number.");
    module.def("call", &metakern::cuda::call, py::arg("index"), py::arg("is_bf16"), py::arg("tensors"), py::arg("sizes"),
               py::arg("scalars"), py::arg("stream"), py::arg("allocate"),
               "Launch a kernel and say how. metakern.native.call checks what it is given.");
}

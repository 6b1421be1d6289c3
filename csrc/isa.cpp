#include "isa.h"

#include <atomic>
#include <stdexcept>

// The files of csrc/cpu that have a table of kernels.
#define METAKERN_FILES(X) \
    X(attention) X(cross_entropy) X(gelu) X(gru) X(layer_norm) X(lstm) X(metalstm_update) \
    X(prototype_log_softmax) X(rms_norm) X(rnn) X(rope) X(silu) X(swiglu)

namespace metakern {

#define METAKERN_DECLARE(file) extern const Kernel file##_kernels[];
#define METAKERN_ENTER(file) file##_kernels,
#define METAKERN_TABLE(isa)                                               \
    namespace isa {                                                       \
    METAKERN_FILES(METAKERN_DECLARE)                                      \
    extern const ProductKernels product_kernels;                          \
    extern const InstructionKernels instruction_kernels;                  \
    extern const PeakKernels peak_kernels;                                \
    const Kernel* const files[] = {METAKERN_FILES(METAKERN_ENTER)};       \
    }

#ifdef METAKERN_HAS_avx512
METAKERN_TABLE(avx512)
#endif
#ifdef METAKERN_HAS_avx2
METAKERN_TABLE(avx2)
#endif
#ifdef METAKERN_HAS_neon
METAKERN_TABLE(neon)
#endif
#ifdef METAKERN_HAS_baseline
METAKERN_TABLE(baseline)
#endif

namespace {

template <std::size_t n>
Isa isa_of(const char* name, const Kernel* const (&files)[n], ProductKernels product, InstructionKernels instructions,
           PeakKernels peak) {
    Isa isa{name, {}, product, instructions, peak};
    for (const Kernel* file : files)
        for (; file->name; ++file) isa.kernels.emplace_back(*file);
    return isa;
}

std::atomic<std::size_t> chosen{0};

}  // namespace

const std::vector<Isa>& isas() {
#define METAKERN_FIND(isa) \
    found->push_back(isa_of(#isa, isa::files, isa::product_kernels, isa::instruction_kernels, isa::peak_kernels));
    static const auto* const list = [] {
        auto* found = new std::vector<Isa>;
#ifdef METAKERN_HAS_avx512
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            METAKERN_FIND(avx512)
        if (!__builtin_cpu_supports("avx512bf16"))
            for (Isa& isa : *found) isa.peak.run[2] = nullptr;
#endif
#ifdef METAKERN_HAS_avx2
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) METAKERN_FIND(avx2)
#endif
#ifdef METAKERN_HAS_neon
        METAKERN_FIND(neon)
#endif
#ifdef METAKERN_HAS_baseline
        METAKERN_FIND(baseline)
#endif
        return found;
    }();
    return *list;
}

const Isa& isa_in_use() { return isas()[chosen]; }

void set_isa(const std::string& name) {
    for (std::size_t i = 0; i < isas().size(); ++i)
        if (isas()[i].name == name) return void(chosen = i);
    throw std::invalid_argument("isa must be one of this machine's, got '" + name + "'");
}

}  // namespace metakern

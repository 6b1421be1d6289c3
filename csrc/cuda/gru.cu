// gru on a GPU: the kernels of csrc/cpu/gru.cpp.
#include "recurrent/rules.cuh"

namespace metakern::cuda {

extern const Kernel gru_kernels[] = {METAKERN_RULES("gru", Gru), {}};

}  // namespace metakern::cuda

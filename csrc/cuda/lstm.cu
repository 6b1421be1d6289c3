// lstm on a GPU: the kernels of csrc/cpu/lstm.cpp.
#include "recurrent/rules.cuh"

namespace metakern::cuda {

extern const Kernel lstm_kernels[] = {METAKERN_RULES("lstm", Lstm), {}};

}  // namespace metakern::cuda

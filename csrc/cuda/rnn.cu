// rnn on a GPU: the kernels of csrc/cpu/rnn.cpp.
#include "recurrent/rules.cuh"

namespace metakern::cuda {

template <class F>
using Tanh = Rnn<F, false>;
template <class F>
using Relu = Rnn<F, true>;

extern const Kernel rnn_kernels[] = {METAKERN_RULES("rnn_tanh", Tanh), METAKERN_RULES("rnn_relu", Relu), {}};

}  // namespace metakern::cuda

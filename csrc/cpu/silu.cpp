// silu(x) = x s(x), with the sigmoid s. Its first-order rules are PyTorch's own kernels.
#include "elementwise.h"

namespace metakern::METAKERN_ISA {

extern const Kernel silu_kernels[] = {
    {"silu_vjp_jvp",
     "x:* t_x:* ct_y:* t_ct_y:*? -> t_ct_x:*",
     0,
     {curvature<float, silu<float>>, curvature<double, silu<double>>}},
    {}};

}  // namespace metakern::METAKERN_ISA

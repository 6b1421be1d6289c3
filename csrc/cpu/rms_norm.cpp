// rms_norm: each row is divided by its root mean square. The rules are in norm.h.
#include "norm.h"

namespace metakern::METAKERN_ISA {

template <class F>
using RMSNorm = Norm<F, false>;

extern const Kernel rms_norm_kernels[] = {
    {"rms_norm_forward",
     "x:TND weight:TD? -> y:TND rstd:TN",
     1,
     {RMSNorm<float>::forward, RMSNorm<double>::forward}},
    {"rms_norm_jvp",
     "x:TND weight:TD? rstd:TN t_x:TND? t_weight:TD? -> t_y:TND t_rstd:TN",
     1,
     {RMSNorm<float>::jvp, RMSNorm<double>::jvp}},
    {"rms_norm_vjp",
     "x:TND weight:TD? rstd:TN ct_y:TND -> ct_x:TND ct_weight:TD?weight",
     1,
     {RMSNorm<float>::vjp, RMSNorm<double>::vjp}},
    {"rms_norm_vjp_jvp",
     "x:TND weight:TD? rstd:TN t_x:TND? t_weight:TD? t_rstd:TN ct_y:TND t_ct_y:TND?"
     " -> t_ct_x:TND t_ct_weight:TD?weight",
     1,
     {RMSNorm<float>::vjp_jvp, RMSNorm<double>::vjp_jvp}},
    {}};

}  // namespace metakern::METAKERN_ISA

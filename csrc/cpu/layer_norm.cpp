// layer_norm: each row is normalized by its own mean and variance. The rules are in norm.h.
#include "norm.h"

namespace metakern::METAKERN_ISA {

template <class F>
using LayerNorm = Norm<F, true>;

extern const Kernel layer_norm_kernels[] = {
    {"layer_norm_forward",
     "x:TND weight:TD? bias:TD? -> y:TND mean:TN rstd:TN",
     1,
     {LayerNorm<float>::forward, LayerNorm<double>::forward}},
    {"layer_norm_jvp",
     "x:TND weight:TD? bias:TD? mean:TN rstd:TN t_x:TND? t_weight:TD? t_bias:TD? -> t_y:TND t_mean:TN t_rstd:TN",
     1,
     {LayerNorm<float>::jvp, LayerNorm<double>::jvp}},
    {"layer_norm_vjp",
     "x:TND weight:TD? bias:TD? mean:TN rstd:TN ct_y:TND -> ct_x:TND ct_weight:TD?weight ct_bias:TD?bias",
     1,
     {LayerNorm<float>::vjp, LayerNorm<double>::vjp}},
    {"layer_norm_vjp_jvp",
     "x:TND weight:TD? bias:TD? mean:TN rstd:TN t_x:TND? t_weight:TD? t_bias:TD? t_mean:TN t_rstd:TN ct_y:TND t_ct_y:TND?"
     " -> t_ct_x:TND t_ct_weight:TD?weight t_ct_bias:TD?bias",
     1,
     {LayerNorm<float>::vjp_jvp, LayerNorm<double>::vjp_jvp}},
    {}};

}  // namespace metakern::METAKERN_ISA

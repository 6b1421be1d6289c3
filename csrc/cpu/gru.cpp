// gru: whole sequences, residuals (r, z, n, p_n) [T, B, L, 4H] and the state before each step.
#include "recurrent.h"

namespace metakern::METAKERN_ISA {

template <class F>
using Rules = Recurrent<F, Gru>;

extern const Kernel gru_kernels[] = {
    {"gru_forward",
     "u:TBL3H w_hh:T3HH b_hh:T3H? h:TBH? lengths:TBi? -> y:TBLH h_n:TBH gates:TBL4H h_before:TBLH",
     1,
     {Rules<float>::forward, Rules<double>::forward}},
    {"gru_jvp",
     "t_u:TBL3H w_hh:T3HH t_p:TBL3H? gates:TBL4H h_before:TBLH t_h:TBH? lengths:TBi?"
     " -> t_y:TBLH t_h_n:TBH t_gates:TBL4H t_h_before:TBLH",
     1,
     {Rules<float>::jvp, Rules<double>::jvp}},
    {"gru_vjp",
     "ct_y:TBLH w_hh:T3HH gates:TBL4H h_before:TBLH ct_h_n:TBH? lengths:TBi?"
     " -> ct_a:TBL3H ct_u:TBL3H ct_h:TBH ct_hs:TBLH",
     1,
     {Rules<float>::vjp, Rules<double>::vjp}},
    {"gru_cotangents",
     "ct_hs:TBLH gates:TBL4H h_before:TBLH -> ct_a:TBL3H ct_u:TBL3H",
     0,
     {Rules<float>::cotangents, Rules<double>::cotangents}},
    {"gru_vjp_jvp",
     "ct_hs:TBLH w_hh:T3HH gates:TBL4H h_before:TBLH t_gates:TBL4H t_h_before:TBLH source:TBLH? t_ct_y:TBLH?"
     " t_ct_h_n:TBH? lengths:TBi? -> t_ct_a:TBL3H t_ct_u:TBL3H t_ct_h:TBH",
     1,
     {Rules<float>::vjp_jvp, Rules<double>::vjp_jvp}},
    {}};

}  // namespace metakern::METAKERN_ISA

// lstm: whole sequences, residuals gates [T, B, L, 4H] and the states before each step.
#include "recurrent.h"

namespace metakern::METAKERN_ISA {

template <class F>
using Rules = Recurrent<F, Lstm>;

extern const Kernel lstm_kernels[] = {
    {"lstm_forward",
     "u:TBL4H w_hh:T4HH h:TBH? c:TBH? lengths:TBi?"
     " -> y:TBLH h_n:TBH c_n:TBH gates:TBL4H=u h_before:TBLH c_before:TBLH",
     1,
     {Rules<float>::forward, Rules<double>::forward}},
    {"lstm_jvp",
     "t_u:TBL4H w_hh:T4HH gates:TBL4H c_before:TBLH t_h:TBH? t_c:TBH? lengths:TBi?"
     " -> t_y:TBLH t_h_n:TBH t_c_n:TBH t_gates:TBL4H=t_u t_h_before:TBLH t_c_before:TBLH",
     1,
     {Rules<float>::jvp, Rules<double>::jvp}},
    {"lstm_vjp",
     "ct_y:TBLH w_hh:T4HH gates:TBL4H c_before:TBLH ct_h_n:TBH? ct_c_n:TBH? lengths:TBi?"
     " -> ct_z:TBL4H ct_h:TBH ct_c:TBH ct_hs:TBLH ct_cs:TBLH",
     1,
     {Rules<float>::vjp, Rules<double>::vjp}},
    {"lstm_cotangents",
     "ct_hs:TBLH ct_cs:TBLH gates:TBL4H c_before:TBLH -> ct_z:TBL4H",
     0,
     {Rules<float>::cotangents, Rules<double>::cotangents}},
    {"lstm_vjp_jvp",
     "ct_hs:TBLH ct_cs:TBLH w_hh:T4HH gates:TBL4H c_before:TBLH t_gates:TBL4H t_c_before:TBLH source:TBLH? t_ct_y:TBLH?"
     " t_ct_h_n:TBH? t_ct_c_n:TBH? lengths:TBi? -> t_ct_z:TBL4H t_ct_h:TBH t_ct_c:TBH",
     1,
     {Rules<float>::vjp_jvp, Rules<double>::vjp_jvp}},
    {}};

}  // namespace metakern::METAKERN_ISA

// rnn: whole sequences, residuals the output and the state before each step.
#include "recurrent.h"

namespace metakern::METAKERN_ISA {

template <class F>
using Tanh = Rnn<F, false>;
template <class F>
using Relu = Rnn<F, true>;

#define METAKERN_RNN(name, Cell)                                                                                        \
    {name "_forward", "u:TBLH w_hh:THH h:TBH? lengths:TBi? -> y:TBLH h_n:TBH h_before:TBLH", 1,                         \
     {Recurrent<float, Cell>::forward, Recurrent<double, Cell>::forward}},                                              \
    {name "_jvp", "t_u:TBLH w_hh:THH y:TBLH t_h:TBH? lengths:TBi? -> t_y:TBLH t_h_n:TBH t_h_before:TBLH", 1,            \
     {Recurrent<float, Cell>::jvp, Recurrent<double, Cell>::jvp}},                                                      \
    {name "_vjp", "ct_y:TBLH w_hh:THH y:TBLH ct_h_n:TBH? lengths:TBi? -> ct_z:TBLH ct_h:TBH ct_hs:TBLH", 1,            \
     {Recurrent<float, Cell>::vjp, Recurrent<double, Cell>::vjp}},                                                      \
    {name "_cotangents", "ct_hs:TBLH y:TBLH -> ct_z:TBLH", 0,                                                           \
     {Recurrent<float, Cell>::cotangents, Recurrent<double, Cell>::cotangents}},                                        \
    {name "_vjp_jvp",                                                                                                   \
     "ct_hs:TBLH w_hh:THH y:TBLH t_y:TBLH source:TBLH? t_ct_y:TBLH? t_ct_h_n:TBH? lengths:TBi?"                         \
     " -> t_ct_z:TBLH t_ct_h:TBH",                                                                                      \
     1,                                                                                                                 \
     {Recurrent<float, Cell>::vjp_jvp, Recurrent<double, Cell>::vjp_jvp}}

extern const Kernel rnn_kernels[] = {METAKERN_RNN("rnn_tanh", Tanh), METAKERN_RNN("rnn_relu", Relu), {}};

}  // namespace metakern::METAKERN_ISA

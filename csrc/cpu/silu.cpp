// silu(x) = x s(x), with the sigmoid s.
#include "elementwise.h"

namespace metakern::METAKERN_ISA {

METAKERN_UNARY_RULES(silu, silu)

extern const Kernel silu_kernels[] = {METAKERN_UNARY_TABLE(silu), {}};

}  // namespace metakern::METAKERN_ISA

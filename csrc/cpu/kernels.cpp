// The table of one instruction set; compiled once for each.
#include "kernels.h"

#include "conv_row.h"

namespace ffnet {
namespace FFNET_ISA {
#define FFNET_DECLARATION(name, Operation) void name(const Operation&, const Executor&);
FFNET_KERNELS(FFNET_DECLARATION)
#undef FFNET_DECLARATION
bool pairs_conv2d(const Conv2d&, const Conv2d&);
void conv2d_pair(const Conv2d&, const Conv2d&, const Executor&);
int64_t multiply_adds(Storage, int64_t);
}  // namespace FFNET_ISA

#define FFNET_JOIN(a, b) a##b
#define FFNET_TABLE_NAME(isa) FFNET_JOIN(isa, _kernels)
#define FFNET_STRING(isa) #isa
#define FFNET_ISA_NAME(isa) FFNET_STRING(isa)

const Kernels* FFNET_TABLE_NAME(FFNET_ISA)() {
#define FFNET_ENTRY(name, Operation) FFNET_ISA::name,
  static constexpr Kernels table = {
      FFNET_ISA_NAME(FFNET_ISA), FFNET_ISA::Vec::lanes,
      FFNET_KERNELS(FFNET_ENTRY)[](int64_t kh, int64_t kw){return FFNET_ISA::is_unrolled(kh, kw);
}
, FFNET_ISA::pairs_conv2d, FFNET_ISA::conv2d_pair, FFNET_ISA::multiply_adds,
};  // namespace ffnet
#undef FFNET_ENTRY
return &table;
}

}  // namespace ffnet

// The table of one instruction set; compiled once for each.
#include "kernels.h"

#include "conv_row.h"

namespace ffnet {
namespace FFNET_ISA {
void depthwise_conv2d(const DepthwiseConv2d&, const Executor&);
void depthwise_conv2d_backward(const DepthwiseConv2dBackward&, const Executor&);
void ffnified_attention(const FfnifiedAttention&, const Executor&);
void ffnified_attention_backward(const FfnifiedAttentionBackward&, const Executor&);
void channel_mixer(const ChannelMixer&, const Executor&);
void conv2d(const Conv2d&, const Executor&);
bool pairs_conv2d(const Conv2d&, const Conv2d&);
void conv2d_pair(const Conv2d&, const Conv2d&, const Executor&);
void pointwise_conv2d_backward(const PointwiseConv2dBackward&, const Executor&);
void batch_norm(const BatchNorm&, const Executor&);
void batch_norm_backward(const BatchNormBackward&, const Executor&);
void branched_depthwise(const BranchedDepthwise&, const Executor&);
void branched_depthwise_backward(const BranchedDepthwiseBackward&, const Executor&);
void feed_forward(const FeedForward&, const Executor&);
void feed_forward_backward(const FeedForwardBackward&, const Executor&);
int64_t multiply_adds(Storage, int64_t);
}  // namespace FFNET_ISA

#define FFNET_JOIN(a, b) a##b
#define FFNET_TABLE_NAME(isa) FFNET_JOIN(isa, _kernels)
#define FFNET_STRING(isa) #isa
#define FFNET_ISA_NAME(isa) FFNET_STRING(isa)

const Kernels* FFNET_TABLE_NAME(FFNET_ISA)() {
  static constexpr Kernels table = {
      FFNET_ISA_NAME(FFNET_ISA),
      FFNET_ISA::Vec::lanes,
      [](int64_t kh, int64_t kw) { return FFNET_ISA::is_unrolled(kh, kw); },
      FFNET_ISA::depthwise_conv2d,
      FFNET_ISA::depthwise_conv2d_backward,
      FFNET_ISA::ffnified_attention,
      FFNET_ISA::ffnified_attention_backward,
      FFNET_ISA::channel_mixer,
      FFNET_ISA::conv2d,
      FFNET_ISA::pairs_conv2d,
      FFNET_ISA::conv2d_pair,
      FFNET_ISA::pointwise_conv2d_backward,
      FFNET_ISA::batch_norm,
      FFNET_ISA::batch_norm_backward,
      FFNET_ISA::branched_depthwise,
      FFNET_ISA::branched_depthwise_backward,
      FFNET_ISA::feed_forward,
      FFNET_ISA::feed_forward_backward,
      FFNET_ISA::multiply_adds,
  };
  return &table;
}

}  // namespace ffnet

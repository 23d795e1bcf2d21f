// ffnified_attention backward: all gradients in one pass over query and the incoming gradient g.
//
// With z = DW(query; key), h = act(z):
//   dh = DW'(scale * g; value), dz = dh * act'(z), dquery = DW'(dz; key)       (DW' is a convolution's input gradient)
//   dkey = wgrad(dz, query), dvalue = scale * v, v = wgrad(g, h)               (biases: sums of dz and scale * g)
//   dscale = sum of g * (DW(h; value) + value_bias)
// A band of rows at a time: z, h and dz exist in rings of rows only.
#include "activation.h"
#include "filter_grad.h"
#include "partial_sums.h"
#include "row_ring.h"
#include "wgrad_row.h"

namespace ffnet::FFNET_ISA {
namespace {

constexpr int64_t kBandPixels = 256;

// A convolution's rows above (before) and below (after) an output row that it reads, and its mirror image's.
struct Reach {
  int64_t before, after;
  Reach(const Filter& f, int64_t pad_top) : before(pad_top), after(f.kh - 1 - pad_top) {}
};

struct Work {
  const FfnifiedAttentionBackward& op;
  GradientTiling tiling;
  const PartialSums& sums;
  ConvRow conv_key, conv_value;
  int64_t band;
  Reach key, value;

  bool wants_key() const { return op.key_grad.weight || op.key_grad.bias; }
  bool wants_middle() const { return op.query_grad || wants_key(); }          // dz
  bool wants_value() const { return op.value_grad.weight || op.scale_grad; }  // h
  bool has_slope() const { return op.activation != Activation::none; }
  int64_t key_floats() const { return op.key.kh * op.key.kw * kLanes; }
  int64_t value_floats() const { return op.value.kh * op.value.kw * kLanes; }
  // In a task's sums: dkey, its bias, v, sum of g, dscale.
  int64_t value_at() const { return key_floats() + kLanes; }
  int64_t scale_at() const { return value_at() + value_floats() + kLanes; }
  Lanes lanes(int64_t vector) const {
    const int64_t first = vector * kLanes;
    return {first, min_of(kLanes, op.channels - first), 1};
  }
};

// One task's vector of channels.
template <class T>
class Task {
 public:
  Task(const Work& work, const Lanes& lanes, float* sums)
      : work_(work),
        op_(work.op),
        lanes_(lanes),
        sums_(sums),
        query_map_{static_cast<const T*>(op_.query), op_.query_stride, lanes, op_.h, op_.w},
        grad_map_{static_cast<const T*>(op_.grad), op_.grad_stride, lanes, op_.h, op_.w},
        query_grad_map_{static_cast<T*>(op_.query_grad), op_.query_grad_stride, lanes, op_.h, op_.w} {
    const Reach &k = work.key, &v = work.value;
    // Rows around a band: middle rows that its gradients need, then what those need.
    const int64_t middle = work.band + max_of(k.after, v.before) + max_of(k.before, v.after);
    const int64_t grads = work.band + k.before + k.after + v.before + v.after;
    query_ = RowRing(op_.h, op_.w, middle + op_.key.kh - 1, k.before, k.after);
    hidden_ = RowRing(op_.h, op_.w, work.wants_value() ? middle : 1, v.before, v.after);
    slope_ = RowRing(op_.h, op_.w, work.wants_middle() ? middle : 1, k.after, k.before);
    grad_ = RowRing(op_.h, op_.w, grads, v.after, v.before);
    const int64_t line = op_.w * kLanes, key_floats = packed_floats<FloatTaps>(op_.key),
                  value_floats = packed_floats<FloatTaps>(op_.value);
    const int64_t out_floats = op_.query_grad ? min_of(work.band, op_.h) * line : 0;
    Arena arena(query_.scratch_floats() + hidden_.scratch_floats() + slope_.scratch_floats() + grad_.scratch_floats() +
                2 * key_floats + 2 * value_floats + line + out_floats);
    query_.place(arena), hidden_.place(arena), slope_.place(arena), grad_.place(arena);
    conv_key_ =
        pack_filter<T, FloatTaps>(op_.key, lanes.first, lanes.count, 1, op_.key_pad_left, arena.floats(key_floats));
    mirrored_key_ = pack_same_mirrored(op_.key, op_.key_pad_top, op_.key_pad_left, arena.floats(key_floats));
    conv_value_ = pack_filter<T, FloatTaps>(op_.value, lanes.first, lanes.count, 1, op_.value_pad_left,
                                            arena.floats(value_floats));
    float* value = arena.floats(value_floats);
    mirrored_value_ = pack_same_mirrored(op_.value, op_.value_pad_top, op_.value_pad_left, value);
    if (op_.scale) {
      const Vec scale = Vec::load_first(op_.scale + lanes.first, lanes.count);
      for (int64_t i = 0; i < work.value_floats(); i += kLanes) (Vec::load(value + i) * scale).store(value + i);
    }
    line_ = arena.floats(line);
    out_ = arena.floats(out_floats);
  }

  // Rows [first, last) of the gradients of an image.
  void run(int64_t n, int64_t first, int64_t last, bool more_images) {
    more_images_ = more_images;
    const Reach &k = work_.key, &v = work_.value;
    middle_made_ = max_of(0, op_.query_grad ? first - k.after : first);
    z_made_ = max_of(0, min_of(middle_made_, work_.wants_value() ? first - v.before : first));
    query_made_ = max_of(0, z_made_ - k.before);
    grad_made_ = max_of(0, work_.wants_middle() ? min_of(first, middle_made_ - v.after) : first);
    for (int64_t u = first; u < last; u += work_.band) {
      const int64_t end = min_of(u + work_.band, last);
      const int64_t middle = work_.wants_middle() ? min_of(op_.h, op_.query_grad ? end + k.before : end) : 0;
      const int64_t hidden = work_.wants_value() ? min_of(op_.h, end + v.after) : 0;
      make_z(n, max_of(middle, hidden));
      gather_grad(n, max_of(end, middle ? min_of(op_.h, middle + v.before) : 0));
      if (op_.value_grad.weight)
        add_filter_sums(
            {grad_.window(u), hidden_.window(u - v.before), end - u, 1, 1, 0, op_.w, -op_.value_pad_left, op_.w},
            op_.value.kh, op_.value.kw, sums_ + work_.value_at());
      if (op_.value_grad.bias) add_bias_sum(grad_, u, end, op_.w, sums_ + work_.value_at() + work_.value_floats());
      if (op_.scale_grad) add_scale_sum(u, end);
      if (!work_.wants_middle()) continue;
      make_middle(n, middle);
      if (op_.key_grad.weight)
        add_filter_sums(
            {slope_.window(u), query_.window(u - k.before), end - u, 1, 1, 0, op_.w, -op_.key_pad_left, op_.w},
            op_.key.kh, op_.key.kw, sums_);
      if (op_.key_grad.bias) add_bias_sum(slope_, u, end, op_.w, sums_ + work_.key_floats());
      if (op_.query_grad) make_query_grad(n, u, end);
    }
  }

 private:
  PackedFilter pack_same_mirrored(const Filter& f, int64_t pad_top, int64_t pad_left, float* out) const {
    return pack_mirrored<T>(f, {0, 1, f.kh, pad_top}, {0, 1, f.kw, pad_left}, 1, 1, lanes_, out);
  }

  // Rows of z up to `last`, as h and act'(z).
  void make_z(int64_t n, int64_t last) {
    if (last <= z_made_) return;
    const int64_t query_last = min_of(op_.h, last + work_.key.after);
    query_.gather(query_map_, n, query_made_, query_last);
    query_made_ = query_last;
    const bool middle = work_.wants_middle() && work_.has_slope(), value = work_.wants_value();
    for (int64_t r = z_made_; r < last && (middle || value); ++r) {
      query_map_.prefetch(n, r + work_.key.after + work_.band, more_images_);
      float* z = middle ? slope_.line(r) : hidden_.line(r);
      work_.conv_key({query_.window(r - work_.key.before), kLanes, op_.w}, conv_key_, {z, kLanes, 0, op_.w});
      if (middle) {
        slope_row(z, value ? hidden_.line(r) : nullptr, op_.w, op_.activation);
      } else {
        activate_row(z, kLanes, op_.w, op_.activation);
      }
    }
    z_made_ = last;
  }

  // The result is made again: <value, v> + value_bias * (sum of g), the same number, cancels where biases are large.
  void add_scale_sum(int64_t first, int64_t last) {
    float* sum = sums_ + work_.scale_at();
    for (int64_t r = first; r < last; ++r) {
      work_.conv_value({hidden_.window(r - work_.value.before), kLanes, op_.w}, conv_value_, {line_, kLanes, 0, op_.w});
      const float* grad = grad_.line(r);
      Vec row[2] = {Vec::fill(0), Vec::fill(0)};
      for (int64_t i = 0; i < op_.w; ++i)
        row[i % 2] = fma(Vec::load(line_ + i * kLanes), Vec::load(grad + i * kLanes), row[i % 2]);
      (Vec::load(sum) + (row[0] + row[1])).store(sum);
    }
  }

  void gather_grad(int64_t n, int64_t last) {
    grad_.gather(grad_map_, n, grad_made_, last);
    grad_made_ = last;
  }

  // Rows of dz up to `last`, in place of act'(z).
  void make_middle(int64_t n, int64_t last) {
    for (int64_t r = middle_made_; r < last; ++r) {
      grad_map_.prefetch(n, r + work_.value.before + work_.band, more_images_);
      float* dz = slope_.line(r);
      float* dh = work_.has_slope() ? line_ : dz;
      work_.conv_value({grad_.window(r - work_.value.after), kLanes, op_.w}, mirrored_value_, {dh, kLanes, 0, op_.w});
      if (work_.has_slope()) apply_slope_row(dh, dz, dz, op_.w, op_.activation);
    }
    middle_made_ = max_of(middle_made_, last);
  }

  void make_query_grad(int64_t n, int64_t first, int64_t last) {
    const int64_t line = op_.w * kLanes;
    for (int64_t r = first; r < last; ++r) {
      query_grad_map_.prefetch(n, r, false);
      work_.conv_key({slope_.window(r - work_.key.after), kLanes, op_.w}, mirrored_key_,
                     {out_ + (r - first) * line, kLanes, 0, op_.w});
    }
    scatter_rows(out_, last - first, op_.w, lanes_, query_grad_map_.row(n, first), query_grad_map_.stride);
  }

  const Work& work_;
  const FfnifiedAttentionBackward& op_;
  Lanes lanes_;
  float* sums_;
  MapView<const T> query_map_, grad_map_;
  MapView<T> query_grad_map_;
  bool more_images_ = false;
  RowRing query_, hidden_, slope_, grad_;  // slope: act'(z), then dz
  PackedFilter conv_key_{}, conv_value_{}, mirrored_key_{}, mirrored_value_{};
  float *line_ = nullptr, *out_ = nullptr;
  int64_t query_made_ = 0, z_made_ = 0, grad_made_ = 0, middle_made_ = 0;  // rows that have been made
};

template <class T>
void finish_task(void* context, int64_t vector) {
  const Work& work = *static_cast<const Work*>(context);
  const FfnifiedAttentionBackward& op = work.op;
  const Lanes lanes = work.lanes(vector);
  float *key = work.sums.total(vector), *value = key + work.value_at(), *grad_sum = value + work.value_floats();
  store_filter_grad<T>(key, key + work.key_floats(), op.key.kh, op.key.kw, lanes, op.key_grad);
  if (op.scale_grad)
    store_first(Vec::load(key + work.scale_at()), static_cast<T*>(op.scale_grad) + lanes.first, lanes.count);
  if (op.scale) {
    const Vec scale = Vec::load_first(op.scale + lanes.first, lanes.count);
    for (float* p = value; p <= grad_sum; p += kLanes) (Vec::load(p) * scale).store(p);
  }
  store_filter_grad<T>(value, grad_sum, op.value.kh, op.value.kw, lanes, op.value_grad);
}

}  // namespace

void ffnified_attention_backward(const FfnifiedAttentionBackward& op, const Executor& executor) {
  const GradientTiling tiling(ceil_div(op.channels, kLanes), op.n, op.h);
  const int64_t taps = op.key.kh * op.key.kw + op.value.kh * op.value.kw;
  const PartialSums sums(tiling, (taps + 3) * kLanes);
  Work work{op,
            tiling,
            sums,
            select_conv_row<FloatTaps>(op.key, 1),
            select_conv_row<FloatTaps>(op.value, 1),
            max_of(1, kBandPixels / op.w),
            Reach(op.key, op.key_pad_top),
            Reach(op.value, op.value_pad_top)};
  with_storage(op.storage, [&](auto element) {
    using T = decltype(element);
    tiling.run(executor, op.query_stride.c == 1 ? vectors_in_line(op.storage) : 1, run_gradient_task<Task<T>, Work>,
               &work);
    executor.run(tiling.vectors(), finish_task<T>, &work);
  });
}

}  // namespace ffnet::FFNET_ISA

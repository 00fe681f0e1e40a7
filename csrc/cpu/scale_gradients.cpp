// Finished gradients times the incoming one, on the CPU.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>

#include "device.h"

namespace fastfocal {
namespace {

template <class T>
void scale_piece(const void* source, void* target, int64_t begin, int64_t end, double factor) {
  const T* from = static_cast<const T*>(source);
  T* to = static_cast<T*>(target);
  if (factor == 1.0) {
    if (from != to) std::memcpy(static_cast<void*>(to + begin), from + begin, static_cast<size_t>(end - begin) * sizeof(T));
    return;
  }
  using S = Accumulation<T>;
  const S f = static_cast<S>(factor);
  const auto scale_each = [&](auto times) {
    for (int64_t i = begin; i < end; ++i) to[i] = rounded<T>(times(to_float(from[i])));
  };
  if (std::isfinite(f)) {
    scale_each([f](S g) { return g * f; });
  } else {
    scale_each([f](S g) { return times_incoming(g, f); });
  }
}

template <class T>
void scale_all(const ScaleParams& params) {
  torch::stable::parallel_for(0, params.pieces, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const ScalePiece piece = scale_piece_at(params, i);
      const double factor = incoming_scale<Accumulation<T>>(params.incoming, params.incoming_stride, params.reduction,
                                                            params.first_level + piece.level, piece.image);
      const ScaleLevel& level = params.level[piece.level];
      scale_piece<T>(level.source, level.target, piece.begin, piece.end, factor);
    }
  });
}

}  // namespace

void Cpu::scale(const ScaleParams& params, const Tensor&) {
  bool in_place = true;
  for (int l = 0; l < params.count; ++l)  // an empty level has no memory that would tell
    in_place &= params.level[l].image_logits == 0 || params.level[l].source == params.level[l].target;
  if (params.reduction == Reduction::kSum && in_place) {  // by 1, the common case, it costs nothing
    const double factor = params.dtype == DType::kFloat64 ? *static_cast<const double*>(params.incoming)
                                                          : *static_cast<const float*>(params.incoming);
    if (factor == 1.0) return;
  }
  with_dtype(params.dtype, [&](auto gradient) { scale_all<type_of<decltype(gradient)>>(params); });
}

}  // namespace fastfocal

// Finished gradients times the incoming one, on the CPU.
#include <cmath>
#include <cstring>

#include "device.h"

namespace fastfocal {
namespace {

template <class T, class S>
void scale_piece(const void* source, void* target, int64_t begin, int64_t end, double factor) {
  const T* from = static_cast<const T*>(source);
  T* to = static_cast<T*>(target);
  if (factor == 1.0) {
    if (from != to) std::memcpy(static_cast<void*>(to + begin), from + begin, static_cast<size_t>(end - begin) * sizeof(T));
    return;
  }
  const S f = static_cast<S>(factor);
  const auto scale_each = [&](auto times) {
    for (int64_t i = begin; i < end; ++i) {
      if constexpr (sizeof(T) == sizeof(double)) {
        to[i] = times(from[i]);
      } else {
        to[i] = from_float<T>(times(to_float(from[i])));
      }
    }
  };
  if (std::isfinite(f)) {
    scale_each([f](S g) { return g * f; });
  } else {
    scale_each([f](S g) { return times_incoming(g, f); });
  }
}

template <class T, class S>
void scale_all(const ScaleCall& call) {
  torch::stable::parallel_for(0, call.pieces, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const ScalePiece piece = scale_piece_at(call, i);
      const double factor = incoming_scale<S>(call.incoming, call.incoming_stride, call.reduction,
                                              call.first_level + piece.level, piece.image);
      const ScaleLevel& level = call.level[piece.level];
      scale_piece<T, S>(level.source, level.target, piece.begin, piece.end, factor);
    }
  });
}

}  // namespace

void Cpu::scale(const ScaleCall& call, const Tensor&) {
  bool in_place = true;
  for (int l = 0; l < call.count; ++l)  // an empty level has no memory that would tell
    in_place &= call.level[l].image_logits == 0 || call.level[l].source == call.level[l].target;
  if (call.reduction == Reduction::kSum && in_place) {  // by 1, the common case, it costs nothing
    const double factor = call.dtype == DType::kFloat64 ? *static_cast<const double*>(call.incoming)
                                                        : *static_cast<const float*>(call.incoming);
    if (factor == 1.0) return;
  }
  switch (call.dtype) {
    case DType::kFloat32:
      return scale_all<float, float>(call);
    case DType::kFloat16:
      return scale_all<Half, float>(call);
    case DType::kBFloat16:
      return scale_all<BFloat16, float>(call);
    case DType::kFloat64:
      return scale_all<double, double>(call);
  }
}

}  // namespace fastfocal

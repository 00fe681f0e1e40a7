// Finished gradients times the incoming one, which is read on the device: where it is 1 nothing is moved in place.
#include "kernels.h"
#include "launch.h"

namespace fastfocal::cuda {
namespace {

template <class T, class S>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleCall call) {
  const int64_t last = first_item(call.pieces, blockIdx.x + 1);
  for (int64_t index = first_item(call.pieces, blockIdx.x); index < last; ++index) {
    const ScalePiece piece = scale_piece_at(call, index);
    const ScaleLevel& level = call.level[piece.level];
    const S factor = S(
        incoming_scale<S>(call.incoming, call.incoming_stride, call.reduction, call.first_level + piece.level, piece.image));
    if (factor == S(1) && level.source == level.target) continue;
    const bool finite = factor - factor == S(0);
    const auto times = [=](S g) { return finite ? g * factor : times_incoming(g, factor); };
    const T* from = static_cast<const T*>(level.source);
    T* to = static_cast<T*>(level.target);
    for (int64_t i = piece.begin + threadIdx.x; i < piece.end; i += kThreads) {
      if constexpr (sizeof(T) == sizeof(double)) {
        to[i] = times(from[i]);
      } else {
        to[i] = from_float<T>(times(to_float(from[i])));
      }
    }
  }
}

template <class T, class S>
void launch_scale(const ScaleCall& call, const Context& context) {
  static std::atomic<int> known[kMaxDevices];
  const int64_t resident = resident_blocks(scale_kernel<T, S>, known, context);
  launch(scale_kernel<T, S>, call.pieces < resident ? call.pieces : resident, context, call);
}

}  // namespace

void scale(const ScaleCall& call, const Context& context) {
  switch (call.dtype) {
    case DType::kFloat32:
      return launch_scale<float, float>(call, context);
    case DType::kFloat16:
      return launch_scale<Half, float>(call, context);
    case DType::kBFloat16:
      return launch_scale<BFloat16, float>(call, context);
    case DType::kFloat64:
      return launch_scale<double, double>(call, context);
  }
}

}  // namespace fastfocal::cuda

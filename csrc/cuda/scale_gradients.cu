// Finished gradients times the incoming one, which is read on the device: where it is 1 nothing is moved in place.
#include "kernels.h"
#include "launch.h"

namespace fastfocal::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleParams params) {
  using S = Accumulation<T>;
  const int64_t last = first_item(params.pieces, blockIdx.x + 1);
  for (int64_t index = first_item(params.pieces, blockIdx.x); index < last; ++index) {
    const ScalePiece piece = scale_piece_at(params, index);
    const ScaleLevel& level = params.level[piece.level];
    const S factor = S(incoming_scale<S>(params.incoming, params.incoming_stride, params.reduction,
                                         params.first_level + piece.level, piece.image));
    if (factor == S(1) && level.source == level.target) continue;
    const bool finite = factor - factor == S(0);
    const auto times = [=](S g) { return finite ? g * factor : times_incoming(g, factor); };
    const T* from = static_cast<const T*>(level.source);
    T* to = static_cast<T*>(level.target);
    for (int64_t i = piece.begin + threadIdx.x; i < piece.end; i += kThreads) to[i] = rounded<T>(times(to_float(from[i])));
  }
}

template <class T>
void launch_scale(const ScaleParams& params, const Context& context) {
  static std::atomic<int> known[kMaxDevices];
  const int64_t resident = resident_blocks(scale_kernel<T>, known, context);
  launch(scale_kernel<T>, params.pieces < resident ? params.pieces : resident, context, params);
}

}  // namespace

void scale(const ScaleParams& params, const Context& context) {
  with_dtype(params.dtype, [&](auto gradient) { launch_scale<type_of<decltype(gradient)>>(params, context); });
}

}  // namespace fastfocal::cuda

#include "focal_loss_general.cuh"

void fastfocal::cuda::run_general_float32(const Call& call, const Context& context) {
  run_general<float, float>(call, context);
}

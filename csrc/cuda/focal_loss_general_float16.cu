#include "focal_loss_general.cuh"

void fastfocal::cuda::run_general_float16(const Call& call, const Context& context) {
  run_general<Half, float>(call, context);
}

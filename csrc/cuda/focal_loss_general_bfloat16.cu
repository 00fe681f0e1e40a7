#include "focal_loss_general.cuh"

void fastfocal::cuda::run_general_bfloat16(const Call& call, const Context& context) {
  run_general<BFloat16, float>(call, context);
}

#include "focal_loss_general.cuh"

void fastfocal::cuda::run_general_float64(const Call& call, const Context& context) {
  run_general<double, double>(call, context);
}

#include "focal_loss_plain.cuh"

void fastfocal::cuda::run_plain_bfloat16(const Call& call, const Context& context) { run_plain<BFloat16>(call, context); }

#include "focal_loss_plain.cuh"

void fastfocal::cuda::run_plain_float16(const Call& call, const Context& context) { run_plain<Half>(call, context); }

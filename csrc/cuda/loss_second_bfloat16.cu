// The second derivative for logits of bfloat16.
#include "loss_second.cuh"

template void fastfocal::cuda::run_second<fastfocal::BFloat16>(const KernelParams&, const Context&);

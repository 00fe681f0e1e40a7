// The generic kernels for logits of bfloat16.
#include "loss_generic.cuh"

template void fastfocal::cuda::run_generic<fastfocal::BFloat16>(const KernelParams&, const Context&);

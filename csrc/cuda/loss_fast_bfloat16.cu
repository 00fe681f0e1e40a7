// The fast kernels for logits of bfloat16.
#include "loss_fast.cuh"

template void fastfocal::cuda::run_fast<fastfocal::BFloat16>(const KernelParams&, const Context&);

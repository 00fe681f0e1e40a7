// The fast kernels for logits of float16.
#include "loss_fast.cuh"

template void fastfocal::cuda::run_fast<fastfocal::Half>(const KernelParams&, const Context&);

// The fast kernels for logits of float32.
#include "loss_fast.cuh"

template void fastfocal::cuda::run_fast<float>(const KernelParams&, const Context&);

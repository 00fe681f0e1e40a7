// The generic kernels for logits of float32.
#include "loss_generic.cuh"

template void fastfocal::cuda::run_generic<float>(const KernelParams&, const Context&);

// The generic kernels for logits of float16.
#include "loss_generic.cuh"

template void fastfocal::cuda::run_generic<fastfocal::Half>(const KernelParams&, const Context&);

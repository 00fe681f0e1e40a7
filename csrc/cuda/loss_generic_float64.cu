// The generic kernels for logits of float64.
#include "loss_generic.cuh"

template void fastfocal::cuda::run_generic<double>(const KernelParams&, const Context&);

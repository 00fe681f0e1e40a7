// The second derivative for logits of float64.
#include "loss_second.cuh"

template void fastfocal::cuda::run_second<double>(const KernelParams&, const Context&);

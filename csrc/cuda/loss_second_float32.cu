// The second derivative for logits of float32.
#include "loss_second.cuh"

template void fastfocal::cuda::run_second<float>(const KernelParams&, const Context&);

// The second derivative for logits of float16.
#include "loss_second.cuh"

template void fastfocal::cuda::run_second<fastfocal::Half>(const KernelParams&, const Context&);

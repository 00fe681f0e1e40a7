// The kernel of the softmax focal loss for logits of float64.
#include "loss_softmax.cuh"

template void fastfocal::cuda::run_softmax<double>(const KernelParams&, const Context&);

// The kernel of the softmax focal loss for logits of float32.
#include "loss_softmax.cuh"

template void fastfocal::cuda::run_softmax<float>(const KernelParams&, const Context&);

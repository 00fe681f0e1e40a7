// The kernel of the softmax focal loss for logits of float16.
#include "loss_softmax.cuh"

template void fastfocal::cuda::run_softmax<fastfocal::Half>(const KernelParams&, const Context&);

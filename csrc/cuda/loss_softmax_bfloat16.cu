// The kernel of the softmax focal loss for logits of bfloat16.
#include "loss_softmax.cuh"

template void fastfocal::cuda::run_softmax<fastfocal::BFloat16>(const KernelParams&, const Context&);

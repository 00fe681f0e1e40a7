// The operators' CUDA versions.
#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(fastfocal, CUDA, m) { fastfocal::cuda::implement_operators(m); }

// The operators' CPU versions.
#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(fastfocal, CPU, m) { fastfocal::Operators<fastfocal::Cpu>::implement(m); }

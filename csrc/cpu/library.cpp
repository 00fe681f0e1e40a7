// The operators' CPU versions.
#include "../operators.h"
#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(fastfocal, CPU, m) { fastfocal::Operators<fastfocal::Cpu>::implement(m); }

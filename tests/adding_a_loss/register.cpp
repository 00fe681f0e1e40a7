// Registers the CPU operators with the portable kernels alone, as torch.ops.fastfocal_walkthrough. It takes the place of
// csrc/cpu/library.cpp, and of the kernels for other instruction sets, which take longest to compile.
#include "cpu/device.h"
#include "cpu/isa.h"
#include "operators.h"

#if defined(__x86_64__)
#define FASTFOCAL_FORWARD(isa)                                                                                              \
  namespace isa {                                                                                                           \
  void run_tiles(const KernelParams& params, int64_t begin, int64_t end) { portable::run_tiles(params, begin, end); }       \
  ChunkCount pack_chunk(const PackLabelsParams& params, const Chunk& chunk) { return portable::pack_chunk(params, chunk); } \
  }

namespace fastfocal {
FASTFOCAL_FORWARD(avx512)
FASTFOCAL_FORWARD(avx2)
}  // namespace fastfocal
#endif

STABLE_TORCH_LIBRARY(fastfocal_walkthrough, m) { fastfocal::define_operators(m); }
STABLE_TORCH_LIBRARY_IMPL(fastfocal_walkthrough, CPU, m) { fastfocal::Operators<fastfocal::Cpu>::implement(m); }

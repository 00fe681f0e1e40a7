// Registers the CPU operators once for each instruction set, whatever the processor: torch.ops.fastfocal_avx512, _avx2 and
// _portable. It takes the place of csrc/cpu/library.cpp.
#include <torch/csrc/stable/ops.h>

#include "cpu/device.h"
#include "cpu/isa.h"
#include "operators.h"

namespace fastfocal {

namespace avx512 {  // declared on x86-64 alone; the stand-in for its intrinsics is compiled anywhere
void run_tiles(const KernelParams& params, int64_t begin, int64_t end);
ChunkCount pack_chunk(const PackLabelsParams& params, const Chunk& chunk);
}  // namespace avx512

template <RunTiles kRunTiles, PackChunk kPackChunk>
struct On : Cpu {
  static void run(const KernelParams& params, const Tensor&) {
    torch::stable::parallel_for(0, params.levels.tiles, 1,
                                [&](int64_t begin, int64_t end) { kRunTiles(params, begin, end); });
  }
  static void pack_labels(const PackLabelsParams& params, const Tensor&) { pack_labels_with(kPackChunk, params); }
};

}  // namespace fastfocal

#define FASTFOCAL_REGISTER(isa)                                                                               \
  STABLE_TORCH_LIBRARY(fastfocal_##isa, m) { fastfocal::define_operators(m); }                                \
  STABLE_TORCH_LIBRARY_IMPL(fastfocal_##isa, CPU, m) {                                                        \
    fastfocal::Operators<fastfocal::On<fastfocal::isa::run_tiles, fastfocal::isa::pack_chunk>>::implement(m); \
  }

FASTFOCAL_REGISTER(avx512)
FASTFOCAL_REGISTER(portable)
#if defined(__x86_64__)
FASTFOCAL_REGISTER(avx2)
#endif

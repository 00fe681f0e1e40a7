// Registers the CPU operators once for each instruction set, whatever the processor: torch.ops.fastfocal_avx512, _avx2 and
// _portable. It takes the place of csrc/cpu/library.cpp.
#include "cpu/device.h"
#include "cpu/focal_loss.h"

namespace fastfocal {

namespace avx512 {  // declared on x86-64 alone; the stand-in for its intrinsics is compiled anywhere
void run_tiles(const Call& call, int64_t begin, int64_t end);
ChunkCount encode_chunk(const LabelCall& call, const Chunk& chunk);
}  // namespace avx512

template <RunTiles kRunTiles, EncodeChunk kEncodeChunk>
struct On : Cpu {
  static void run(const Call& call, const Tensor&) {
    torch::stable::parallel_for(0, call.levels.tiles, 1, [&](int64_t begin, int64_t end) { kRunTiles(call, begin, end); });
  }
  static void encode(const LabelCall& call, const Tensor&) { encode_labels(call, kEncodeChunk); }
};

}  // namespace fastfocal

#define FASTFOCAL_REGISTER(isa)                                                                                 \
  STABLE_TORCH_LIBRARY(fastfocal_##isa, m) { fastfocal::define_operators(m); }                                  \
  STABLE_TORCH_LIBRARY_IMPL(fastfocal_##isa, CPU, m) {                                                          \
    fastfocal::Operators<fastfocal::On<fastfocal::isa::run_tiles, fastfocal::isa::encode_chunk>>::implement(m); \
  }

FASTFOCAL_REGISTER(avx512)
FASTFOCAL_REGISTER(portable)
#if defined(__x86_64__)
FASTFOCAL_REGISTER(avx2)
#endif

// The CPU kernels by instruction set: what each set's translation unit (isa_*.cpp) gives. Free of torch headers, as they include it.
#pragma once

#include "../kernel_params.h"

namespace fastfocal {

// Tiles [begin, end) of a call, one after another.
using RunTiles = void (*)(const KernelParams&, int64_t begin, int64_t end);

// What a chunk's labels are.
struct ChunkCount {
  int64_t positives, ignored, invalid;
};
using PackChunk = ChunkCount (*)(const PackLabelsParams&, const Chunk&);

#define FASTFOCAL_DECLARE_ISA(isa)                                           \
  namespace isa {                                                            \
  void run_tiles(const KernelParams& params, int64_t begin, int64_t end);    \
  ChunkCount pack_chunk(const PackLabelsParams& params, const Chunk& chunk); \
  }
#if defined(__x86_64__)
FASTFOCAL_DECLARE_ISA(avx512)
FASTFOCAL_DECLARE_ISA(avx2)
#endif
FASTFOCAL_DECLARE_ISA(portable)
#undef FASTFOCAL_DECLARE_ISA

// The instruction set in use: "AVX512", "AVX2" or "default", the names torch uses. FASTFOCAL_CPU_CAPABILITY, read once,
// lowers it.
const char* cpu_capability();

// pack_chunk of that instruction set.
PackChunk chunk_packer();

// The operator pack_labels with a given one.
void pack_labels_with(PackChunk pack_chunk, const PackLabelsParams& params);

}  // namespace fastfocal

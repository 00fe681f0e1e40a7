// The CPU kernels by instruction set. Free of torch headers: the vector translation units include it.
#pragma once

#include "../call.h"

namespace fastfocal {

// Tiles [begin, end) of a call, one after another.
using RunTiles = void (*)(const Call&, int64_t begin, int64_t end);

// What a chunk's labels are.
struct ChunkCount {
  int64_t positives, ignored, invalid;
};
using EncodeChunk = ChunkCount (*)(const LabelCall&, const Chunk&);

#define FASTFOCAL_DECLARE_ISA(isa)                                    \
  namespace isa {                                                     \
  void run_tiles(const Call& call, int64_t begin, int64_t end);       \
  ChunkCount encode_chunk(const LabelCall& call, const Chunk& chunk); \
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

// encode_chunk of that instruction set.
EncodeChunk chunk_encoder();

// The operator label_codes with a given one.
void encode_labels(const LabelCall& call, EncodeChunk encode_chunk);

}  // namespace fastfocal

// The compiler's own vectors: SSE2, NEON, whatever the target has.
#define FASTFOCAL_ISA portable
#include "pack_chunk.h"
#include "tiles.h"

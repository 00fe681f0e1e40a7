// The compiler's own vectors: SSE2, NEON, whatever the target has.
#define FASTFOCAL_ISA portable
#include "focal_tile.h"
#include "label_chunk.h"

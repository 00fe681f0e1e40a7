// -mavx2 -mfma -mf16c, given by setup.py on x86-64 alone.
#define FASTFOCAL_ISA avx2
#include "pack_chunk.h"
#include "tiles.h"

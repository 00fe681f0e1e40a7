// -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c, given by setup.py on x86-64 alone.
#define FASTFOCAL_ISA avx512
#include "pack_chunk.h"
#include "tiles.h"

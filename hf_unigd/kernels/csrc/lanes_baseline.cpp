// The baseline of the architecture: SSE2 on x86-64, NEON on AArch64.
#define UNIGD_ISA baseline
#define UNIGD_VECTOR_BYTES 16
#include "lanes_impl.h"

// Stands in front of the C library's <assert.h> (and so of <cassert>): a false assertion ends the kernel launch with an
// exception, as a device-side assertion ends it on a GPU, instead of ending the process. NDEBUG does not switch it off.
//
// No include guard: like the original, every inclusion defines the macro anew.
#include_next <assert.h>

namespace cuda_on_host {
[[noreturn]] void assertion_failed(const char* expression, const char* file, int line);
}

#undef assert
#define assert(expression) ((expression) ? void() : ::cuda_on_host::assertion_failed(#expression, __FILE__, __LINE__))

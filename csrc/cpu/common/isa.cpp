// Which instruction set the host runs, of those that the ops are compiled for (CMakeLists.txt).
#include "kimi.h"

extern "C" int kimi_abi_version(void) { return KIMI_ABI_VERSION; }

extern "C" const char* kimi_cpu_isa(void) {
#if defined(__x86_64__)
  // The compiler's run-time checks include the operating system's support for the registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) {
    return "avx512";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return "avx2";
  }
#endif
  return "scalar";
}

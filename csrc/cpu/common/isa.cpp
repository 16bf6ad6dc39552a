// Which instruction sets the host runs, of those that the ops are compiled for (CMakeLists.txt).
#include "kimi.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <string>

namespace {

// The compiler's run-time checks include the operating system's support for the registers.
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

[[maybe_unused]] bool has_avx512f() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

[[maybe_unused]] bool has_avx512() {
  return has_avx512f() && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16");
}

// Linux gives a process the tile registers when it asks for them (x86 "Using XSTATE features").
[[maybe_unused]] bool has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

std::string find_isas() {
  __builtin_cpu_init();
  std::string found;
#ifdef KIMI_WITH_amx
  if (has_amx()) found += "amx ";
#endif
#ifdef KIMI_WITH_avx512
  if (has_avx512()) found += "avx512 ";
#endif
#ifdef KIMI_WITH_avx512f
  if (has_avx512f()) found += "avx512f ";
#endif
#ifdef KIMI_WITH_avx2
  if (has_avx2()) found += "avx2 ";
#endif
  return found + "scalar";
}

}  // namespace

extern "C" const char* kimi_cpu_isas(void) {
  static const std::string isas = find_isas();
  return isas.c_str();
}
#else
extern "C" const char* kimi_cpu_isas(void) { return "scalar"; }
#endif

extern "C" int kimi_abi_version(void) { return KIMI_ABI_VERSION; }

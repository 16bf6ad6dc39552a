// The whole C ABI of the CPU library, one declaration per entry, shapes in the margin.
//
// Plain C types only; the library allocates nothing that the caller must free and keeps no state
// between calls. KIMI_ABI_VERSION rises with every incompatible change (kimi_ops/_native.py
// refuses a library of another version).
#ifndef KIMI_H_
#define KIMI_H_

#define KIMI_ABI_VERSION 1
#define KIMI_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Version of this header that the library was built with.
KIMI_EXPORT int kimi_abi_version(void);

// Best instruction set that this host runs and the library has code for: "avx512" (F, BW, VL, DQ,
// VNNI and BF16), "avx2" (with FMA and F16C) or "scalar". A static string.
KIMI_EXPORT const char* kimi_cpu_isa(void);

#ifdef __cplusplus
}
#endif

#endif  // KIMI_H_

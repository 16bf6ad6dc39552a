// Integers that a caller has in 32 or in 64 bits.
#pragma once

#include <cstdint>

namespace kimi::KIMI_ISA {

struct Indices {
  const void* data;
  int64_t bytes;  // of each: 4 or 8

  int64_t operator[](int64_t i) const {
    return bytes == 4 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  }
};

}  // namespace kimi::KIMI_ISA

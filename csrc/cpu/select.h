// Choosing the experts of one token from its logits; the ops moe_select and moe_route end with it.
//
//   score = sigmoid(logit);  the K largest of score + bias;  weights from the scores alone
//
// Lanes are experts. Biased scores become integers that order alike, a NaN below -infinity, and of
// each vector of W of them the largest is kept: a step finds the largest of those, takes its first
// lane in its first vector (ties go to the lower id) and looks at that one vector again.
#pragma once

#include <climits>

#include "cpu/math.h"

namespace kimi::KIMI_ISA {

inline constexpr int64_t kMostExperts = 1024, kMostChosen = 32;

// The largest lane, and the first lane that equals x; one does.
inline int32_t largest(I x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t found = x[0];
  for (int i = 1; i < W; ++i) found = std::max(found, x[i]);
  return found;
#endif
}
inline int first_equal(I lanes, int32_t x) {
#if defined(__AVX512F__)
  const I wanted = I{} + x;
  return __builtin_ctz(_mm512_cmpeq_epi32_mask((__m512i)lanes, (__m512i)wanted));
#elif defined(__AVX2__)
  const I equal = lanes == x;
  return __builtin_ctz(static_cast<unsigned>(_mm256_movemask_ps((__m256)equal)));
#else
  int i = 0;
  while (lanes[i] != x) ++i;
  return i;
#endif
}

// Integers that order like floats, both zeros alike; it is its own inverse but for NaN and -0.
inline constexpr int32_t kNone = INT_MIN,
                         kNaN = INT_MIN + 1;  // chosen already or never; below -inf
inline I ordered(F x) {
  const I bits = (I)(x + 0.0f);
  return x == x ? bits ^ ((bits >> 31) & 0x7fffffff) : I{} + kNaN;
}
inline float value_of(int32_t key) {
  if (key == kNaN) return -__builtin_inff();
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Selection {
  const float* bias;  // [experts]
  int64_t experts, top_k, n_group, topk_group;
  float scale;
  bool normalize;

  // weights[top_k] and ids[top_k], best first, from logits[experts].
  void choose(const float* logits, float* weights, int32_t* ids) const {
    Keys keys;
    float scores[kMostExperts];
    const int64_t vectors = (experts + W - 1) / W;
    for_each_piece(experts, [&](int64_t i, auto n) {
      const F score = sigmoid(load_piece(logits + i, n));
      store_piece(scores + i, score, n);
      I key = ordered(score + load_piece(bias + i, n));
      if constexpr (std::is_same_v<decltype(n), int64_t>) {
        for (int64_t lane = n; lane < W; ++lane) key[lane] = kNone;
      }
      keys.vector[i / W] = key;
    });
    if (topk_group < n_group) drop_groups(keys);
    take(keys, vectors, ids);

    float sum = 0.0f;
    for (int64_t k = 0; k < top_k; ++k) {
      weights[k] = scores[ids[k]];
      sum += weights[k];
    }
    const F divisor = splat(normalize ? sum + 1e-20f : 1.0f);
    for_each_piece(top_k, [&](int64_t k, auto n) {
      store_piece(weights + k, load_piece(weights + k, n) / divisor * scale, n);
    });
  }

 private:
  struct Keys {
    I vector[kMostExperts / W];
    int32_t* of(int64_t expert) { return reinterpret_cast<int32_t*>(vector) + expert; }
  };

  void take(Keys& keys, int64_t vectors, int32_t* ids) const {
    I best[kMostExperts / W / W];  // of each vector
    const int64_t bests = (vectors + W - 1) / W;
    for (int64_t i = 0; i < bests; ++i) {
      for (int j = 0; j < W; ++j) {
        const int64_t vector = i * W + j;
        best[i][j] = vector < vectors ? largest(keys.vector[vector]) : kNone;
      }
    }
    for (int64_t k = 0; k < top_k; ++k) {
      I all = best[0];
      for (int64_t i = 1; i < bests; ++i) all = best[i] > all ? best[i] : all;
      const int32_t key = largest(all);
      int64_t i = 0;
      if (bests > 1) {
        while (largest(best[i]) != key) ++i;
      }
      const int j = first_equal(best[i], key);
      I& vector = keys.vector[i * W + j];
      const int lane = first_equal(vector, key);
      ids[k] = static_cast<int32_t>((i * W + j) * W + lane);
      vector = with_lane(vector, lane, kNone);
      best[i] = with_lane(best[i], j, largest(vector));
    }
  }

  // A whole vector, so that it can be loaded right after it is stored.
  static I with_lane(I x, int lane, int32_t value) {
#if defined(__AVX512F__)
    return (I)_mm512_mask_set1_epi32((__m512i)x, static_cast<__mmask16>(1u << lane), value);
#else
    x[lane] = value;
    return x;
#endif
  }

  // Leaves the experts of the best `topk_group` groups, by the sum of their two best biased scores;
  // a sum that is NaN (of both infinities) is the last.
  void drop_groups(Keys& keys) const {
    const int64_t size = experts / n_group;
    int32_t sums[kMostExperts];
    for (int64_t group = 0; group < n_group; ++group) {
      int32_t first = kNone, second = kNone;
      for (int64_t i = group * size; i < (group + 1) * size; ++i) {
        const int32_t key = *keys.of(i);
        second = std::max(second, std::min(first, key));
        first = std::max(first, key);
      }
      const float pair = size > 1 ? value_of(first) + value_of(second) : value_of(first);
      sums[group] = ordered(splat(pair))[0];
    }
    bool kept[kMostExperts] = {};
    for (int64_t i = 0; i < topk_group; ++i) {
      int64_t best = -1;
      for (int64_t group = 0; group < n_group; ++group) {
        if (!kept[group] && (best < 0 || sums[group] > sums[best])) best = group;
      }
      kept[best] = true;
    }
    for (int64_t i = 0; i < experts; ++i) {
      if (!kept[i / size]) *keys.of(i) = kNone;
    }
  }
};

}  // namespace kimi::KIMI_ISA

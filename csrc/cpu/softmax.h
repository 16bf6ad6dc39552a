// The softmax of attention, block of keys by block of keys.
//
// Lanes are queries: the scores of kPanel queries lie side by side, scores[key][kPanel], as
// multiply() leaves keys x queries^T. Maxima and sums go down the columns, so nothing ever crosses
// lanes. The weights leave turned, weights[query][key]: the left operand of the product with
// values.
#pragma once

#include <cmath>

#include "cpu/math.h"
#include "cpu/pack.h"

namespace kimi::KIMI_ISA {

// Words of two weights rounded to bfloat16, the first in the low half. They lie within 0 .. 1, or
// are a NaN that began as bfloat16: rounding cannot carry it to infinity.
inline U pair_weights(F first, F second) {
#if defined(__AVX512BF16__)
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (U)_mm512_permutexvar_epi16(order, halves);
#else
  const U a = (U)first, b = (U)second;
  return (a + 0x7fff + ((a >> 16) & 1)) >> 16 | ((b + 0x7fff + ((b >> 16) & 1)) & 0xffff0000u);
#endif
}

// Of a NaN and a number the number: the NaN comes back in the weight.
inline F larger(F x, F y) { return x > y ? x : y; }

// What the queries of a panel have seen so far.
struct alignas(64) Softmax {
  float maximum[kPanel];  // of the scaled scores; -inf before the first key
  float total[kPanel];    // sum of e^(score - maximum)
  float fade[kPanel];     // e^(maximum before the last block - maximum): for earlier weighted sums

  Softmax() {
    std::fill_n(maximum, kPanel, -kInfinity);
    std::fill_n(total, kPanel, 0.0f);
    std::fill_n(fade, kPanel, 0.0f);
  }

  // weights[kPanel][stride] of a block of keys, in O as an operand of multiply(): e^(scale *
  // score - maximum). Each row of them is written up to `keys` rounded up to kDepth, with 0 there.
  // A query sees the first visible[query] keys of the block, any number, negative or past the end
  // too; all of them where `visible` is null.
  template <class O>
  void add(O* weights, int64_t stride, const float* scores, int64_t keys, float scale,
           const int32_t* visible) {
    for (int lane = 0; lane < kPanel; lane += W) {
      if (visible) {
        I limit;
        std::memcpy(&limit, visible + lane, sizeof limit);
        add_lanes(weights + lane * stride, stride, scores + lane, keys, lane,
                  [&](int64_t key, F x) {
                    return static_cast<int32_t>(key) < limit ? x * scale : splat(-kInfinity);
                  });
      } else {
        add_lanes(weights + lane * stride, stride, scores + lane, keys, lane,
                  [&](int64_t, F x) { return x * scale; });
      }
    }
  }

  // sums[query][columns] of earlier blocks to the maximum of now; `columns` is a multiple of W.
  void fade_rows(float* sums, int64_t stride, int64_t queries, int64_t columns) const {
    for (int64_t query = 0; query < queries; ++query) {
      if (fade[query] == 1.0f) continue;
      float* row = sums + query * stride;
      for (int64_t i = 0; i < columns; i += W) store(row + i, load(row + i) * fade[query]);
    }
  }

  // What a query's weighted sum is multiplied by at the end; 0 without a key.
  float normalizer(int64_t query) const {
    return total[query] == 0.0f ? 0.0f : 1.0f / total[query];
  }

  // Natural logarithm of the sum of e^score; -inf without a key.
  float lse(int64_t query) const { return maximum[query] + std::log(total[query]); }

 private:
  // W lanes from `lane` on; scaled(key, x) is the score that counts, -inf for a hidden key.
  template <class O, class Scaled>
  void add_lanes(O* weights, int64_t stride, const float* scores, int64_t keys, int lane,
                 const Scaled& scaled) {
    auto score = [&](int64_t key) { return scaled(key, load(scores + key * kPanel)); };
    F high[4];
    for (F& x : high) x = splat(-kInfinity);
    int64_t key = 0;
    for (; key + 4 <= keys; key += 4) {
      for (int i = 0; i < 4; ++i) high[i] = larger(score(key + i), high[i]);
    }
    for (; key < keys; ++key) high[0] = larger(score(key), high[0]);
    const F old = load(maximum + lane);
    const F now = larger(larger(larger(high[0], high[1]), larger(high[2], high[3])), old);
    const F shift = now == -kInfinity ? F{} : now;  // without a key: e^-inf and no NaN
    const F faded = exp(old - shift);

    constexpr int kWords = kPairs<O> ? 2 : 1;
    F sums[2] = {};
    // weight(key) of kWords x W keys, turned.
    auto turn = [&](int64_t first, const auto& weight) {
      U block[W];
      for (int r = 0; r < W; ++r) {
        if constexpr (kPairs<O>) {
          const F even = weight(first + 2 * r), odd = weight(first + 2 * r + 1);
          sums[0] += even;
          sums[1] += odd;
          block[r] = pair_weights(even, odd);
        } else {
          const F x = weight(first + r);
          sums[r % 2] += x;
          block[r] = (U)x;
        }
      }
      transpose(block);
      for (int r = 0; r < W; ++r) {
        std::memcpy(weights + r * stride + first, &block[r], sizeof block[r]);
      }
    };
    int64_t first = 0;
    for (; first + kWords * W <= keys; first += kWords * W) {
      turn(first, [&](int64_t i) { return exp(score(i) - shift); });
    }
    for (; first < (keys + kDepth - 1) / kDepth * kDepth; first += kWords * W) {
      turn(first, [&](int64_t i) { return i < keys ? exp(score(i) - shift) : F{}; });
    }
    store(maximum + lane, now);
    store(fade + lane, faded);
    store(total + lane, load(total + lane) * faded + (sums[0] + sums[1]));
  }
};

// The softmax over several splits of the keys, part(split) each, always first to last; and
// weights[split][kPanel], the shares of the splits' weighted sums in the result.
template <class Part>
inline Softmax join(int64_t splits, const Part& part, float* weights) {
  Softmax all;
  for (int lane = 0; lane < kPanel; lane += W) {
    F high = splat(-kInfinity), total = {};
    for (int64_t i = 0; i < splits; ++i) high = larger(load(part(i).maximum + lane), high);
    const F shift = high == -kInfinity ? F{} : high;
    for (int64_t i = 0; i < splits; ++i) {
      const F share = exp(load(part(i).maximum + lane) - shift);
      total += share * load(part(i).total + lane);
      store(weights + i * kPanel + lane, share);
    }
    const F normalizer = total == 0.0f ? F{} : 1.0f / total;
    for (int64_t i = 0; i < splits; ++i) {
      store(weights + i * kPanel + lane, load(weights + i * kPanel + lane) * normalizer);
    }
    store(all.maximum + lane, high);
    store(all.total + lane, total);
  }
  return all;
}

}  // namespace kimi::KIMI_ISA

// lse = log(e^lse_a + e^lse_b), out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b.
//
// Rows in ranges; of W rows at a time the lse and the two shares first, rows as lanes, then row
// after row its V columns. A side whose lse is -inf is not read. 3 V elements and 12 bytes a row.
#include "cpu/math.h"
#include "cpu/parallel.h"

namespace kimi::KIMI_ISA {
namespace {

// log(1 + x) for x within 0 .. 1, as 2 artanh(x / (2 + x)).
F log_of_1_plus(F x) {
  const F s = x / (2.0f + x), z = s * s;
  F p = splat(1.0f / 17);
  for (const float odd : {15.0f, 13.0f, 11.0f, 9.0f, 7.0f, 5.0f, 3.0f}) p = p * z + 1.0f / odd;
  return 2.0f * s + 2.0f * s * (p * z);
}

struct Merged {
  F lse, share_a, share_b;
};

// Of W rows. NaN and +inf on either side make the shares NaN, as e^(inf - inf) is.
Merged merge(F a, F b) {
  const F larger = a != a ? a : b > a || b != b ? b : a;
  const F e = exp(-(a > b ? a - b : b - a));  // of the smaller side, relative to the larger
  const F undefined = larger - larger;        // 0, or NaN
  const F share = 1.0f / (1.0f + e) + undefined;
  return {a == b ? a + 0.693147181f : larger + log_of_1_plus(e), a >= b ? share : e * share,
          a >= b ? e * share : share};
}

// A side without keys has lse -inf, and its row is not read: it may hold anything.
template <class E>
void merge_row(E* out, const E* a, const E* b, bool has_a, bool has_b, float share_a, float share_b,
               int64_t width) {
  const F x = splat(share_a), y = splat(share_b);
  auto write = [&](auto&& merged) {
    for_each_piece(width, [&](int64_t i, auto n) { store_piece(out + i, merged(i, n), n); });
  };
  if (has_a && has_b) {
    write([&](int64_t i, auto n) { return x * load_piece(a + i, n) + y * load_piece(b + i, n); });
  } else if (has_a || has_b) {
    const E* only = has_a ? a : b;
    const F share = has_a ? x : y;
    write([&](int64_t i, auto n) { return share * load_piece(only + i, n); });
  } else {
    write([](int64_t, auto) { return F{}; });
  }
}

template <class E>
void merge_attention(const kimi_team* team, E* out, float* lse, const E* out_a,
                     const kimi_rows& rows_a, const float* lse_a, const E* out_b,
                     const kimi_rows& rows_b, const float* lse_b, int64_t rows, int64_t width) {
  const int64_t grain = (1 + 16384 / (width + 1) + W - 1) / W * W;
  for_each_range(team, rows, grain, [&](int64_t first, int64_t last) {
    for_each_piece(last - first, [&](int64_t i, auto n) {
      const Merged merged =
          merge(load_piece(lse_a + first + i, n), load_piece(lse_b + first + i, n));
      store_piece(lse + first + i, merged.lse, n);
      float share_a[W], share_b[W];
      store(share_a, merged.share_a);
      store(share_b, merged.share_b);
      for (int64_t row = first + i, lane = 0; lane < n; ++row, ++lane) {
        merge_row(out + row * width, out_a + row_start(rows_a, row), out_b + row_start(rows_b, row),
                  lse_a[row] != -kInfinity, lse_b[row] != -kInfinity, share_a[lane], share_b[lane],
                  width);
      }
    });
  });
}

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(merge_attention)(const kimi_team* team, int64_t dtype, void* out,
                                          float* lse, const void* out_a, kimi_rows rows_a,
                                          const float* lse_a, const void* out_b, kimi_rows rows_b,
                                          const float* lse_b, int64_t rows, int64_t width) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      merge_attention(team, static_cast<E*>(out), lse, static_cast<const E*>(out_a), rows_a, lse_a,
                      static_cast<const E*>(out_b), rows_b, lse_b, rows, width);
    });
  });
}

// How an op spreads its work over threads, and what every entry of the library starts with.
//
// The results of an op never depend on the number of threads: work is cut into items by the shapes
// alone, one thread computes an item, and threads take items in turn.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__SANITIZE_THREAD__)
#include <chrono>
#include <thread>
#endif

#include "kimi.h"

// kimi_<op>_<isa>, the name of an entry in the source that is compiled for KIMI_ISA.
#define KIMI_JOIN_(op, isa) kimi_##op##_##isa
#define KIMI_JOIN(op, isa) KIMI_JOIN_(op, isa)
#define KIMI_NAME(op) KIMI_JOIN(op, KIMI_ISA)

namespace kimi::KIMI_ISA {

// The items of a call that nobody has taken yet.
class Items {
 public:
  explicit Items(int64_t count) : count_(count) {}

  // Takes the next item; false when none is left.
  bool take(int64_t& item) {
#if defined(__SANITIZE_THREAD__)
    // A turn for the other threads: one alone would be through with a test's few items.
    std::this_thread::sleep_for(std::chrono::microseconds(200));
#endif
    item = next_.fetch_add(1, std::memory_order_relaxed);
    return item < count_;
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_;
};

// Calls body(items) on the team's threads, at most one per item. A body takes items until there are
// none; what it allocates before that is its thread's own. Throws std::bad_alloc if a body did.
template <class Body>
void run_items(const kimi_team* team, int64_t count, const Body& body) {
  if (count <= 0) return;
  struct Call {
    Items items;
    const Body& body;
    std::atomic<bool> failed{false};
  } call{Items(count), body};
  auto task = [](void* data) {
    Call& call = *static_cast<Call*>(data);
    try {
      call.body(call.items);
    } catch (const std::bad_alloc&) {
      call.failed.store(true, std::memory_order_relaxed);
    }
  };
  const int64_t threads = std::min(team->threads, count);
  if (threads <= 1) {
    task(&call);
  } else {
    team->run(task, &call, static_cast<unsigned>(threads), 0);
  }
  if (call.failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

// The same where an item needs nothing of its thread's: calls body(item).
template <class Body>
void for_each_item(const kimi_team* team, int64_t count, const Body& body) {
  run_items(team, count, [&](Items& items) {
    for (int64_t item; items.take(item);) body(item);
  });
}

// Calls body(first, last) for ranges that cover 0 .. count, of `grain` but for the last one.
template <class Body>
void for_each_range(const kimi_team* team, int64_t count, int64_t grain, const Body& body) {
  for_each_item(team, (count + grain - 1) / grain,
                [&](int64_t item) { body(item * grain, std::min(count, (item + 1) * grain)); });
}

// Where a row starts, in elements.
inline int64_t row_start(const kimi_rows& rows, int64_t row) {
  return row / rows.inner * rows.stride_outer + row % rows.inner * rows.stride_inner;
}

// Uninitialised memory on a cache line's border.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))));
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

// Runs an entry's body; what the entry returns.
template <class Body>
int entry(const Body& body) {
  try {
    body();
  } catch (const std::bad_alloc&) {
    return KIMI_NO_MEMORY;
  }
  return 0;
}

}  // namespace kimi::KIMI_ISA

// Threads without a pool.
#include <thread>
#include <vector>

#include "kimi.h"

extern "C" void kimi_run_threads(void (*task)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(task, data);
  task(data);
  for (std::thread& other : others) other.join();
}

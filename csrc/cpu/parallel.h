#pragma once

#include <cstdint>
#include <functional>

namespace mlxsae::cpu {

/** Threads that kernels run on, the calling one included. */
int num_threads();

/**
 * Sets it; n >= 1. MLXSAE_NUM_THREADS gives the value at start, else the cores that this process may use. Waits for
 * whatever is computing.
 */
void set_num_threads(int n);

/**
 * While one lives the number of threads stays what it is: a task sizes what its workers write to by it. A thread may
 * hold several.
 */
class Computing {
 public:
  Computing();
  ~Computing();
  Computing(const Computing&) = delete;
  Computing& operator=(const Computing&) = delete;
};

/**
 * Runs task(i, worker) for every i in [0, n) and returns when all are done; worker is in [0, num_threads()).
 * Tasks are handed out in ascending order, one at a time. The first exception is rethrown here.
 */
void parallel_for(int64_t n, const std::function<void(int64_t i, int worker)>& task);

}  // namespace mlxsae::cpu

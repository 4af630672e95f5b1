// Memory roof of the update pass: three arrays are read and written in place, each thread on its own part of all three.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

struct Probe {
  size_t n;
  int threads;
  float* a[3];
};

template <typename F>
void each_part(const Probe& p, F body) {
  std::vector<std::thread> team;
  // Parts begin at multiples of 1024 floats, so that no two threads share a page.
  size_t step = (p.n / p.threads + 1023) / 1024 * 1024;
  for (int t = 0; t < p.threads; ++t) {
    size_t begin = t * step < p.n ? t * step : p.n;
    size_t end = begin + step < p.n && t + 1 < p.threads ? begin + step : p.n;
    auto part = [&p, body, begin, end] { body(p.a[0], p.a[1], p.a[2], begin, end); };
    if (t + 1 < p.threads)
      team.emplace_back(part);
    else
      part();
  }
  for (auto& thread : team) thread.join();
}

void sweep(float* __restrict w, float* __restrict m, float* __restrict v, size_t begin, size_t end) {
  // Rows of 1024 floats, the next row of each array prefetched: three streams at once keep the prefetchers busy.
  for (size_t i = begin; i < end; i += 1024) {
    size_t stop = i + 1024 < end ? i + 1024 : end;
    for (size_t j = i; j < stop; j += 16) {
      __builtin_prefetch(w + j + 1024, 1, 3);
      __builtin_prefetch(m + j + 1024, 1, 3);
      __builtin_prefetch(v + j + 1024, 1, 3);
      for (size_t l = j; l < j + 16 && l < stop; ++l) {
        w[l] += 1.0f;
        m[l] += 1.0f;
        v[l] += 1.0f;
      }
    }
  }
}

void plain_sweep(float* __restrict w, float* __restrict m, float* __restrict v, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    w[i] += 1.0f;
    m[i] += 1.0f;
    v[i] += 1.0f;
  }
}

double seconds(const Probe& p, void (*body)(float*, float*, float*, size_t, size_t)) {
  auto start = std::chrono::steady_clock::now();
  each_part(p, body);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

extern "C" void* probe_make(size_t n, int threads) {
  auto* p = new Probe{n, threads, {}};
  size_t huge = size_t(2) << 20;
  for (auto& a : p->a) {
    size_t bytes = (n * sizeof(float) + huge - 1) / huge * huge;
    a = static_cast<float*>(std::aligned_alloc(huge, bytes));
#if defined(__linux__)
    madvise(a, bytes, MADV_HUGEPAGE);
#endif
  }
  each_part(*p, [](float* w, float* m, float* v, size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) w[i] = m[i] = v[i] = 1.0f;
  });
  return p;
}

// Seconds of the fastest of two sweeps of each kind: a roof is what can be reached.
extern "C" double probe_run(void* probe) {
  auto& p = *static_cast<Probe*>(probe);
  double best = 1e9;
  for (int i = 0; i < 2; ++i)
    for (auto body : {sweep, plain_sweep}) {
      double t = seconds(p, body);
      if (t < best) best = t;
    }
  return best;
}

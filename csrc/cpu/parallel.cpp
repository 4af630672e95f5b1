#include "cpu/parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <shared_mutex>
#include <thread>
#include <vector>

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sched.h>
#endif
#include <pthread.h>

namespace mlxsae::cpu {
namespace {

int default_threads() {
  if (const char* env = std::getenv("MLXSAE_NUM_THREADS")) {
    if (int n = std::atoi(env); n >= 1) return n;
  }
#if defined(__APPLE__)
  int n = 0;  // performance cores only: a static share for an efficiency core would hold all others up
  size_t size = sizeof(n);
  if (sysctlbyname("hw.perflevel0.logicalcpu", &n, &size, nullptr, 0) == 0 && n > 0) return n;
#elif defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  unsigned n_hw = std::thread::hardware_concurrency();
  return n_hw ? static_cast<int>(n_hw) : 1;
}

/**
 * A fixed team that sleeps between jobs. Its caller waits for those threads only that took part, so a worker that the
 * system lets wait for a core holds nobody up. A job from inside a job, or beside one, runs on its own thread alone.
 */
class Team {
 public:
  explicit Team(int n) {
    for (int w = 1; w < n; ++w) workers_.emplace_back([this, w] { loop(w); });
  }
  ~Team() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
  }

  /** False where the team is busy with another caller's job. */
  bool run(int64_t n, const std::function<void(int64_t, int)>& task) {
    std::unique_lock one_job(job_mutex_, std::try_to_lock);
    if (!one_job) return false;
    {
      std::lock_guard lock(mutex_);
      task_ = &task;
      n_ = n;
      next_.store(0, std::memory_order_relaxed);
      error_ = nullptr;
      open_ = true;
      ++job_;
    }
    wake_.notify_all();
    work(0);
    await([this] { return inside_ == 0; });
    std::unique_lock lock(mutex_);
    open_ = false;
    done_.wait(lock, [this] { return inside_ == 0; });
    if (error_) std::rethrow_exception(error_);
    return true;
  }

  /** Whether this thread is running a task. */
  static bool& busy() {
    static thread_local bool flag = false;
    return flag;
  }

 private:
  /** Looks out for what is about to happen: to sleep and be woken takes as long as a small job. */
  template <class Happened>
  static void await(Happened&& happened) {
    auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
    while (!happened() && std::chrono::steady_clock::now() < end) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
  void work(int worker) {
    busy() = true;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_;) {
      try {
        (*task_)(i, worker);
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
        next_.store(n_, std::memory_order_relaxed);
      }
    }
    busy() = false;
  }
  void loop(int worker) {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      lock.unlock();
      await([&] { return stop_ || job_ != seen; });
      lock.lock();
      wake_.wait(lock, [&] { return stop_ || (open_ && job_ != seen); });
      if (stop_) return;
      seen = job_;
      ++inside_;
      lock.unlock();
      work(worker);
      lock.lock();
      if (--inside_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex job_mutex_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t, int)>* task_ = nullptr;
  int64_t n_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int> inside_ = 0;
  std::atomic<uint64_t> job_ = 0;
  bool open_ = false;
  std::atomic<bool> stop_ = false;
  std::exception_ptr error_;
};

std::mutex team_mutex;
Team* team = nullptr;  // leaked at exit on purpose: joining threads in a static destructor can deadlock
int threads = 0;

// Shared by all that compute, owned by a change of the number of threads.
std::shared_mutex* computing = new std::shared_mutex;
thread_local int held = 0;

Team& get_team() {
  std::lock_guard lock(team_mutex);
  if (!team) {
    static bool registered = false;
    if (!registered) {  // threads do not survive fork: the child starts a team of its own
      registered = true;
      pthread_atfork(nullptr, nullptr, [] {
        team = nullptr;
        computing = new std::shared_mutex;  // what held the old one is gone
      });
    }
    if (threads == 0) threads = default_threads();
    team = new Team(threads);
  }
  return *team;
}

}  // namespace

int num_threads() {
  std::lock_guard lock(team_mutex);
  if (threads == 0) threads = default_threads();
  return threads;
}

Computing::Computing() {
  if (held++ == 0) computing->lock_shared();
}

Computing::~Computing() {
  if (--held == 0) computing->unlock_shared();
}

void set_num_threads(int n) {
  std::unique_lock nobody(*computing);
  std::lock_guard lock(team_mutex);
  if (n < 1 || n == threads) return;
  delete team;  // joins
  team = nullptr;
  threads = n;
}

void parallel_for(int64_t n, const std::function<void(int64_t, int)>& task) {
  if (n <= 0) return;
  if (n > 1 && !Team::busy()) {
    Computing whole;
    if (num_threads() > 1 && get_team().run(n, task)) return;
  }
  for (int64_t i = 0; i < n; ++i) task(i, 0);
}

}  // namespace mlxsae::cpu

// Threads for the kernels.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace {

// A pool whose caller never waits for a worker that has not started: on shared cores a worker may be off the CPU for
// milliseconds, and a barrier of all threads (OpenMP's) would stretch every step by that. Work comes in small parts that
// are claimed one by one; the caller only waits for parts that a worker has claimed.
class Pool {
 public:
  static Pool& shared() {
    static Pool* pool = new Pool;  // never destroyed: detached workers may outlive static destructors
    return *pool;
  }

  // work(part) for every part below `parts`, on up to `threads` threads, in any order.
  template <class Work> void run(int threads, int parts, const Work& work) {
    std::unique_lock<std::mutex> mine(caller_, std::defer_lock);
    if (threads < 2 || parts < 2 || !mine.try_lock()) {
      for (int part = 0; part < parts; ++part) work(part);
      return;
    }
    for (; workers_ < threads - 1; ++workers_) std::thread([this] { serve(); }).detach();
    call_ = [](const void* work, int part) { (*(const Work*)work)(part); };
    work_ = &work;
    unfinished_.store(parts);
    ticket_.store(((ticket_.load() >> 32) + 1) << 32 | (uint64_t)parts << 16);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    while (claim()) {}
    for (int spins = 0; unfinished_.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < 1000) pause();
      else std::this_thread::yield();
    }
  }

 private:
  static void pause() { __builtin_ia32_pause(); }
  static bool open(uint64_t ticket) { return (ticket & 0xffff) < ((ticket >> 16) & 0xffff); }

  // Runs one part of the current call, if any is unclaimed. The generation in the ticket keeps a late worker from
  // claiming in a call it has not seen; a claimed part keeps its call alive until it is finished.
  bool claim() {
    uint64_t ticket = ticket_.load();
    while (open(ticket))
      if (ticket_.compare_exchange_weak(ticket, ticket + 1)) {
        call_(work_, (int)(ticket & 0xffff));
        unfinished_.fetch_sub(1, std::memory_order_release);
        return true;
      }
    return false;
  }

  void serve() {
    for (int idle = 0;; ++idle) {
      if (claim()) idle = 0;
      if (idle < 3000) {
        pause();
        continue;
      }
      std::unique_lock<std::mutex> lock(sleep_);
      ++sleepers_;
      wake_.wait(lock, [this] { return open(ticket_.load()); });
      --sleepers_;
      idle = 0;
    }
  }

  std::atomic<uint64_t> ticket_{0};  // generation (32 bits), parts (16), next unclaimed part (16)
  std::atomic<int> unfinished_{0}, sleepers_{0};
  void (*call_)(const void*, int) = nullptr;
  const void* work_ = nullptr;
  int workers_ = 0;
  std::mutex caller_, sleep_;
  std::condition_variable wake_;
};

// work(first, last) over [0, count), cut into a few parts per thread so that a thread that lags takes fewer.
template <class Work> void in_parts(int threads, int count, const Work& work) {
  int parts = threads < 2 ? 1 : count < threads * 4 ? count : threads * 4;
  Pool::shared().run(threads, parts, [&](int part) {
    work((int)((int64_t)count * part / parts), (int)((int64_t)count * (part + 1) / parts));
  });
}

}  // namespace

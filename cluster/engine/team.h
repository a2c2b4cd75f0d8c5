// Threads for the kernels.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int MOST_PARTS = 128;

// One operation of a call, cut into parts that are claimed one by one.
struct Operation {
  std::atomic<int> claimed_again{0}, finished{0};
  std::atomic<bool> claimed[MOST_PARTS] = {}, done[MOST_PARTS] = {};

  void finish(int part) {
    if (!done[part].exchange(true, std::memory_order_acq_rel)) finished.fetch_add(1, std::memory_order_acq_rel);
  }
  bool over(int parts) const { return finished.load(std::memory_order_acquire) == parts; }
  void reset() {  // of one that is over
    const int parts = finished.load(std::memory_order_relaxed);
    claimed_again.store(0, std::memory_order_relaxed);
    finished.store(0, std::memory_order_relaxed);
    for (int part = 0; part < parts; ++part) {
      claimed[part].store(false, std::memory_order_relaxed);
      done[part].store(false, std::memory_order_relaxed);
    }
  }
};

// One thread's way through the operations of a call. All threads of a call meet the same ones in the same order.
//
// A thread may be off the CPU for milliseconds at any time, while other processes have its core; a barrier would stretch
// the step by that. So nobody waits long for a part that another has claimed: whoever has nothing left to do computes it
// again. That takes `repeatable` operations: they read nothing they write, and nothing writes there again in this call, so
// that a late thread's results are the ones that are there already. At a call's last operation it would be in vain, since a
// call ends when all threads have left it.
class Walk {
 public:
  Walk(std::vector<Operation>* operations, int index, int threads, bool repeatable)
      : operations_(operations), index_(index), threads_(threads), repeatable_(repeatable) {}

  // work(prepare(), first, last) over [0, count); each thread prepares for itself, and only if it works at all.
  template <class Prepare, class Work>
  void each(int count, int parts, const Prepare& prepare, const Work& work, bool last = false) {
    if (operations_ == nullptr) {
      work(prepare(), 0, count);
      return;
    }
    assert(at_ < (int)operations_->size());
    Operation& operation = (*operations_)[at_++];
    parts = std::min({parts, count, MOST_PARTS});
    if (operation.over(parts)) return;
    // Each thread begins with its own share, which stands together in memory, and goes on with what others have left.
    const int share = bound(parts, index_, threads_);
    int tried = 0;
    const auto claim = [&] {
      for (; tried < parts; ++tried) {
        const int part = (share + tried) % parts;
        std::atomic<bool>& claimed = operation.claimed[part];
        if (!claimed.load(std::memory_order_relaxed) && !claimed.exchange(true, std::memory_order_relaxed)) return part;
      }
      return parts;
    };
    const auto compute = [&](const auto& prepared, int part) {
      work(prepared, bound(count, part, parts), bound(count, part + 1, parts));
      operation.finish(part);
    };
    uint64_t took = 0;
    if (int part = claim(); part < parts) {
      const uint64_t start = __rdtsc();
      const auto prepared = prepare();
      int own = 0;
      for (; part < parts; part = claim(), ++own) compute(prepared, part);
      took = (__rdtsc() - start) / own;
    }
    const bool repeats = repeatable_ && !last;
    const uint64_t limit = took ? PATIENCE + 2 * took : 4 * PATIENCE;
    if (waited(operation, parts, repeats ? limit : UINT64_MAX)) return;
    const auto claim_again = [&] { return operation.claimed_again.fetch_add(1, std::memory_order_relaxed); };
    if (int part = claim_again(); part < parts) {
      const auto prepared = prepare();
      for (; part < parts; part = claim_again())
        if (!operation.done[part].load(std::memory_order_acquire)) compute(prepared, part);
    }
    waited(operation, parts, UINT64_MAX);
  }

  template <class Work> void each(int count, int parts, const Work& work) {
    each(count, parts, [] { return 0; }, [&](int, int first, int last) { work(first, last); });
  }

  // A few parts a thread, so that one that lags takes fewer.
  int parts() const { return 4 * threads_; }
  int operations() const { return at_; }

 private:
  static constexpr uint64_t PATIENCE = 100'000;  // cycles of the time stamp counter: some 40 microseconds

  static int bound(int count, int part, int parts) { return (int)((int64_t)count * part / parts); }

  // For the parts that others have claimed; false: not any longer than `limit` cycles.
  static bool waited(const Operation& operation, int parts, uint64_t limit) {
    const uint64_t start = __rdtsc();
    for (int spins = 0; !operation.over(parts); ++spins) {
      if (__rdtsc() - start > limit) return false;
      if (spins < 1000) _mm_pause();
      else std::this_thread::yield();
    }
    return true;
  }

  std::vector<Operation>* operations_;  // null: alone
  int index_, threads_, at_ = 0;
  bool repeatable_;
};

// The threads of the process. A call that comes while another is under way runs on its caller's thread alone.
class Team {
 public:
  static Team& shared() {
    static Team* team = new Team;  // never destroyed: detached workers may outlive static destructors
    return *team;
  }

  // body(walk) on up to `threads` threads, in at most `operations` operations. The caller never waits for a worker that
  // has not begun; at the end it waits for those that are under way, since what they write to is the caller's.
  template <class Body> void run(int threads, int operations, bool repeatable, const Body& body) {
    std::unique_lock<std::mutex> mine(caller_, std::defer_lock);
    if (threads < 2 || !mine.try_lock()) {
      Walk alone(nullptr, 0, 1, false);
      body(alone);
      return;
    }
    for (; workers_ < threads - 1; ++workers_) std::thread([this, index = workers_] { serve(index); }).detach();
    if ((int)operations_.size() < operations) operations_ = std::vector<Operation>(operations);
    call_ = [](const void* body, Walk& walk) { (*(const Body*)body)(walk); };
    body_ = &body;
    threads_ = threads;
    repeatable_ = repeatable;
    generation_.fetch_add(1);  // odd: a call is open
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    Walk walk(&operations_, 0, threads, repeatable);
    body(walk);
    generation_.fetch_add(1);
    for (int spins = 0; inside_.load() > 0; ++spins) {
      if (spins < 1000) _mm_pause();
      else std::this_thread::yield();
    }
    for (int i = 0; i < walk.operations(); ++i) operations_[i].reset();
  }

 private:
  static bool open(uint64_t generation) { return generation % 2; }

  // Takes part in the open call, unless it is the one of `seen` or has threads enough.
  bool join(int index, uint64_t& seen) {
    uint64_t generation = generation_.load();
    if (!open(generation) || generation == seen) return false;
    inside_.fetch_add(1);
    if (generation_.load() == generation && index < threads_ - 1) {
      Walk walk(&operations_, index + 1, threads_, repeatable_);
      call_(body_, walk);
    }
    inside_.fetch_sub(1);
    seen = generation;
    return true;
  }

  void serve(int index) {
    uint64_t seen = 0;
    for (int idle = 0;; ++idle) {
      if (join(index, seen)) idle = 0;
      if (idle < 3000) {
        _mm_pause();
        continue;
      }
      std::unique_lock<std::mutex> lock(sleep_);
      ++sleepers_;
      wake_.wait(lock, [&] {
        uint64_t generation = generation_.load();
        return open(generation) && generation != seen;
      });
      --sleepers_;
      idle = 0;
    }
  }

  std::atomic<uint64_t> generation_{0};
  std::atomic<int> inside_{0}, sleepers_{0};
  std::vector<Operation> operations_;
  void (*call_)(const void*, Walk&) = nullptr;
  const void* body_ = nullptr;
  int threads_ = 0, workers_ = 0;
  bool repeatable_ = false;
  std::mutex caller_, sleep_;
  std::condition_variable wake_;
};

}  // namespace

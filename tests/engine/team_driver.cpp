// Calls of a team whose worker falls asleep in the middle of a part; test_team.py says what it expects.
#include <chrono>
#include <cstring>
#include <thread>

#include "team.h"

namespace {

constexpr int COUNT = 64;

bool is_caller(std::thread::id caller) { return std::this_thread::get_id() == caller; }

}  // namespace

// Runs `operations` over `values` (operations + 1, COUNT): each row is the one before, with 1 added to every element. In
// operation `late`, the first part that a worker takes lasts `sleep_ms` more. Returns the milliseconds until the caller's
// thread was through with the last operation, or -1 if no worker took a part of `late`.
extern "C" double run_calls(int32_t* values, int threads, int operations, int late, int sleep_ms, int repeatable) {
  using clock = std::chrono::steady_clock;
  const auto caller = std::this_thread::get_id();
  std::atomic<bool> slept{false};
  double through = -1;
  const auto start = clock::now();
  Team::shared().run(threads, operations, repeatable, [&](Walk& walk) {
    for (int operation = 0; operation < operations; ++operation) {
      const int32_t* from = values + operation * COUNT;
      int32_t* to = values + (operation + 1) * COUNT;
      walk.each(COUNT, walk.parts(), [&](int first, int last) {
        if (operation == late) {
          if (!is_caller(caller) && !slept.exchange(true)) std::this_thread::sleep_for(std::chrono::milliseconds(sleep_ms));
          if (is_caller(caller) && !slept) std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
        for (int i = first; i < last; ++i) to[i] = from[i] + 1;
      });
    }
    if (is_caller(caller)) through = std::chrono::duration<double, std::milli>(clock::now() - start).count();
  });
  return slept || threads < 2 ? through : -1;
}

// The same from two threads at once, over a team that serves one call at a time. Returns whether both were right.
extern "C" int run_at_once(int threads, int rounds) {
  std::atomic<int> wrong{0};
  const auto work = [&] {
    std::vector<int32_t> values(9 * COUNT);
    for (int round = 0; round < rounds; ++round) {
      std::fill(values.begin(), values.end(), round);
      run_calls(values.data(), threads, 8, -1, 0, round % 2);
      for (int i = 0; i < COUNT; ++i) wrong += values[8 * COUNT + i] != round + 8;
    }
  };
  std::thread other(work);
  work();
  other.join();
  return wrong == 0;
}

// Runs csrc/advantage_math.h as a GPU does: one group or batch by a team of threads that meet at every reduction. Built
// with ThreadSanitizer, so a row that two threads touch, or a thread that misses a reduction, is a reported race or a
// hang. Prints the largest relative difference to the one-thread team.

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "advantage_grad.h"

using namespace fastgrpo;

struct Serial {
  int64_t lane() const { return 0; }
  int64_t width() const { return 1; }
  double sum(double x) const { return x; }
  double min(double x) const { return x; }
  double max(double x) const { return x; }
};

struct Shared {
  std::barrier<> meeting;
  std::vector<double> slots;
  explicit Shared(int width) : meeting(width), slots(width) {}
};

struct Threads {
  Shared* shared;
  int64_t index;

  int64_t lane() const { return index; }
  int64_t width() const { return static_cast<int64_t>(shared->slots.size()); }
  template <class Join>
  double reduce(double x, const Join& join) const {
    shared->slots[index] = x;
    shared->meeting.arrive_and_wait();
    double total = shared->slots[0];
    for (size_t i = 1; i < shared->slots.size(); ++i) total = join(total, shared->slots[i]);
    shared->meeting.arrive_and_wait();
    return total;
  }
  double sum(double x) const { return reduce(x, [](double a, double b) { return a + b; }); }
  double min(double x) const { return reduce(x, [](double a, double b) { return std::min(a, b); }); }
  double max(double x) const { return reduce(x, [](double a, double b) { return std::max(a, b); }); }
};

struct Problem {
  int64_t rows, columns, groups;
  std::vector<double> reward, weight, length, upstream;
  std::vector<int64_t> order, offsets;

  explicit Problem(std::mt19937& random) {
    std::uniform_real_distribution<double> uniform(0, 1);
    rows = 1 + random() % 40, columns = 1 + random() % 3, groups = 1 + random() % 4;
    for (int64_t i = 0; i < rows * columns; ++i) reward.push_back(std::round(uniform(random) * 8) / 4 - 0.25);
    for (auto& r : reward) r = uniform(random) < 0.2 ? not_a_number() : r;
    if (random() % 4 == 0) reward[random() % reward.size()] = infinity();
    for (int64_t k = 0; k < columns; ++k) weight.push_back(uniform(random));
    for (int64_t i = 0; i < rows; ++i) {
      length.push_back(static_cast<double>(random() % 5));
      upstream.push_back(uniform(random) - 0.5);
      order.push_back(i);
    }
    std::shuffle(order.begin(), order.end(), random);
    offsets = {0, rows};
    while (static_cast<int64_t>(offsets.size()) <= groups) offsets.push_back(random() % (rows + 1));
    std::sort(offsets.begin(), offsets.end());
  }
  AdvantageInput<double> input() const {
    return {reward.data(), weight.data(), length.data(), order.data(), offsets.data(), rows, columns, groups, 0};
  }
};

struct Result {
  std::vector<double> advantage, mean, std, score, batch, totals, dscore, dreward;
  std::vector<int64_t> counts;
  std::vector<char> degenerate;

  explicit Result(const Problem& p)
      : advantage(p.rows), mean(p.rows), std(p.rows), score(p.rows), batch(kAdvantageBatch), totals(2), dscore(p.rows),
        dreward(p.rows * p.columns), counts(kAdvantageCounts), degenerate(p.rows) {}
};

// What the kernels do, by one team; `wait` separates what are launches on a GPU.
template <class Team, class Wait>
void run(const Team& team, const Problem& p, const AdvantageRule& rule, Result& r, const Wait& wait) {
  const AdvantageInput<double> in = p.input();
  auto* degenerate = reinterpret_cast<bool*>(r.degenerate.data());
  const AdvantageOutput<double> out{r.advantage.data(), r.mean.data(), r.std.data(), degenerate};
  for (int64_t g = 0; g < p.groups; ++g) combine_rewards(team, in, rule, g, r.score.data());
  wait();
  batch_statistics(team, r.score.data(), p.rows, rule.ddof, r.batch.data());
  wait();
  for (int64_t g = 0; g < p.groups; ++g) assign_advantage(team, in, rule, g, r.score.data(), r.batch.data(), out);
  wait();
  count_rows(team, in, r.score.data(), r.counts.data());
  batch_totals(team, p.upstream.data(), r.advantage.data(), r.score.data(), p.rows, r.totals.data());
  wait();
  const AdvantageUpstream<double> up{
      p.upstream.data(), r.advantage.data(), r.score.data(), r.batch.data(), r.totals.data()};
  for (int64_t g = 0; g < p.groups; ++g) group_gradient(team, in, rule, g, up, r.dscore.data(), r.dreward.data());
}

double difference(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 0, scale = 1;
  for (double x : b) scale = is_finite(x) ? std::max(scale, std::fabs(x)) : scale;
  for (size_t i = 0; i < a.size(); ++i) {
    if (is_nan(a[i]) != is_nan(b[i])) return infinity();
    if (a[i] != b[i] && !is_nan(a[i])) largest = std::max(largest, std::fabs(a[i] - b[i]) / scale);
  }
  return largest;
}

int main() {
  std::mt19937 random(0);
  double worst = 0;
  int cases = 0;
  for (int baseline = 0; baseline < 6; ++baseline) {
    for (int scale = 0; scale < 4; ++scale) {
      for (int combine = 0; combine < 2; ++combine) {
        if (baseline == 4 && (scale == 0 || scale == 2)) continue;
        for (int width : {4, 8}) {
          const Problem problem(random);
          const AdvantageRule rule{
              Baseline(baseline), Scale(scale), Combine(combine), Singleton(random() % 2), 1e-4, 1.0, 0.0};
          Result serial(problem), parallel(problem);
          run(Serial(), problem, rule, serial, [] {});
          Shared shared(width);
          std::vector<std::thread> threads;
          for (int i = 0; i < width; ++i) {
            threads.emplace_back([&, i] {
              run(Threads{&shared, i}, problem, rule, parallel, [&] { shared.meeting.arrive_and_wait(); });
            });
          }
          for (auto& thread : threads) thread.join();
          worst = std::max({worst, difference(parallel.advantage, serial.advantage),
                            difference(parallel.dreward, serial.dreward), difference(parallel.std, serial.std)});
          if (parallel.counts != serial.counts || parallel.degenerate != serial.degenerate) worst = infinity();
          ++cases;
        }
      }
    }
  }
  std::printf("%d cases, largest difference %.3g\n", cases, worst);
  return worst < 1e-12 ? 0 : 1;
}

#include "packing.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <queue>
#include <set>
#include <tuple>
#include <utility>

namespace fastgrpo {
namespace {

std::vector<int64_t> longest_first(const Lengths& lengths) {
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  return order;
}

struct Bucket {
  int64_t sum = 0;
  std::vector<int64_t> items;
  int64_t first = std::numeric_limits<int64_t>::max();  // lowest index inside

  // Heaviest first; more items break ties, so that sequences of length 0 spread too and no part stays empty.
  auto key() const { return std::make_tuple(-sum, -static_cast<int64_t>(items.size()), first); }

  void absorb(Bucket& other) {
    sum += other.sum;
    items.insert(items.end(), other.items.begin(), other.items.end());
    first = std::min(first, other.first);
  }
};

// One way to fill `count` buckets with some of the sequences; the method merges the two most uneven ones.
struct Partial {
  int64_t id = 0;
  std::vector<Bucket> buckets;  // sorted by key

  int64_t spread() const { return buckets.front().sum - buckets.back().sum; }
};

struct LessUrgent {
  bool operator()(const Partial& a, const Partial& b) const {
    return std::make_pair(-a.spread(), a.id) > std::make_pair(-b.spread(), b.id);
  }
};

void sort_buckets(std::vector<Bucket>& buckets) {
  std::sort(buckets.begin(), buckets.end(), [](const Bucket& a, const Bucket& b) { return a.key() < b.key(); });
}

Parts sorted_parts(std::vector<Bucket>& buckets) {
  Parts parts;
  for (Bucket& bucket : buckets) {
    std::sort(bucket.items.begin(), bucket.items.end());
    parts.push_back(std::move(bucket.items));
  }
  return parts;
}

}  // namespace

Parts pack_by_token_budget(const Lengths& lengths, int64_t budget, int64_t max_sequences) {
  Parts parts;
  std::set<std::pair<int64_t, int64_t>> open;  // (free tokens, part)
  for (int64_t index : longest_first(lengths)) {
    const int64_t length = lengths[index];
    auto place = open.lower_bound({length, 0});
    int64_t part = static_cast<int64_t>(parts.size());
    int64_t room = budget;
    if (place == open.end()) {
      parts.emplace_back();
    } else {
      std::tie(room, part) = *place;
      open.erase(place);
    }
    parts[part].push_back(index);
    if (static_cast<int64_t>(parts[part].size()) < max_sequences) {
      open.insert({room - length, part});
    }
  }
  for (auto& part : parts) {
    std::sort(part.begin(), part.end());
  }
  return parts;
}

Parts balance(const Lengths& lengths, int64_t count) {
  std::priority_queue<Partial, std::vector<Partial>, LessUrgent> heap;
  int64_t id = 0;
  for (; id < static_cast<int64_t>(lengths.size()); ++id) {
    std::vector<Bucket> buckets(count);
    buckets[0] = Bucket{lengths[id], {id}, id};
    heap.push(Partial{id, std::move(buckets)});
  }
  if (heap.empty()) {
    return Parts(count);
  }
  while (heap.size() > 1) {
    Partial uneven = heap.top();
    heap.pop();
    Partial next = heap.top();
    heap.pop();
    for (int64_t k = 0; k < count; ++k) {
      uneven.buckets[k].absorb(next.buckets[count - 1 - k]);
    }
    sort_buckets(uneven.buckets);
    uneven.id = id++;
    heap.push(std::move(uneven));
  }
  Partial last = heap.top();
  return sorted_parts(last.buckets);
}

}  // namespace fastgrpo

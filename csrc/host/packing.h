// Dividing sequences among micro-batches and ranks by their token counts. Deterministic: ties go to the lower index.
// fastgrpo/host.py has the Python twin, with the same results; it validates the arguments for both.
#pragma once

#include <cstdint>
#include <vector>

namespace fastgrpo {

using Lengths = std::vector<int64_t>;
using Parts = std::vector<std::vector<int64_t>>;

// Best-fit decreasing: few parts, none above `budget` tokens or `max_sequences` sequences.
Parts pack_by_token_budget(const Lengths& lengths, int64_t budget, int64_t max_sequences);

// Karmarkar-Karp largest differencing: exactly `count` parts of nearly equal sums.
Parts balance(const Lengths& lengths, int64_t count);

}  // namespace fastgrpo

// The pools of this process by their numbers, and what is counted of all routed experts.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "experts.h"

namespace dance {

// Null: there is no such pool.
std::shared_ptr<ExpertPool> FindPool(int64_t number);

// Calls run(), which computes routed experts and returns their assignments, and counts it.
void CountRouted(const std::function<int64_t()>& run);

}  // namespace dance

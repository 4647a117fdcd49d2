// Finds the pools of this process by number, and counts the routed experts they compute.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "experts.h"

namespace dance {

// Null if there is no such pool.
std::shared_ptr<ExpertPool> FindPool(int64_t number);

// Calls run(), which computes routed experts and returns the number of assignments, and counts the
// call.
void CountRouted(const std::function<int64_t()>& run);

}  // namespace dance

// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <cstdint>
#include <memory>

#include "drex-cxx/include/model.hpp"

namespace toy {

// Six layers, a ramp after two. Token n of a request is n. Every second one is sure
// at the ramp. The window number `fail_at` throws; 0: none does.
std::unique_ptr<drex::model::Model> make_toy(std::uint32_t requests,
                                             std::uint32_t tokens, std::uint32_t fail_at);

// How many tokens' caches hold what they should: of early ones, the last computed
// layer's K/V in all later layers.
std::uint32_t filled_right(const drex::model::Model &model);

}  // namespace toy

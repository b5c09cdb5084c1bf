#pragma once
#include <napi.h>

#include <memory>

#include "engine/ranks.h"

namespace stroma {
// The ranks behind what joinRanks() resolved to. Throws INVALID_ARGUMENT for anything else, DISPOSED after leave().
std::shared_ptr<engine::Ranks> ranks_of(const Napi::Value& value);
}  // namespace stroma

// What the addon keeps for one JavaScript environment (the main thread, or one worker). Nothing here is static, so
// several environments live side by side; everything is let go in the environment's cleanup hook.
#pragma once
#include <napi.h>

#include <memory>

namespace stroma {

struct TensorDoor;  // binding/handles.h

struct EnvState {
  Napi::FunctionReference error_class;
  std::shared_ptr<TensorDoor> door;
  /// For binding/session*.cc.
  std::shared_ptr<void> sessions;
  /// For binding/ranks.cc.
  std::shared_ptr<void> ranks;
};

/// Made on first use, from the environment's own thread only.
EnvState& env_state(napi_env env);

}  // namespace stroma

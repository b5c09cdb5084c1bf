// The addon's entry: per-environment state and what it exports, the tensor door, the session and the ranks.
#include <c10/util/Logging.h>
#include <napi.h>

#include "binding/exports.h"

namespace {
Napi::Object init(Napi::Env env, Napi::Object exports) {
  c10::initLogging();  // TORCH_CPP_LOG_LEVEL: libtorch itself leaves reading it to its host
  stroma::export_tensor(env, exports);
  stroma::export_session(env, exports);
  stroma::export_ranks(env, exports);
  stroma::export_machine(env, exports);
  return exports;
}
}  // namespace

NODE_API_MODULE(stroma, init)

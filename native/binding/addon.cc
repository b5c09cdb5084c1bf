// The addon's entry: per-environment state and what it exports, the tensor door, the session and the ranks.
#include <napi.h>

#include "binding/exports.h"

namespace {
Napi::Object init(Napi::Env env, Napi::Object exports) {
  stroma::export_tensor(env, exports);
  stroma::export_session(env, exports);
  stroma::export_ranks(env, exports);
  return exports;
}
}  // namespace

NODE_API_MODULE(stroma, init)

#pragma once
#include <napi.h>

namespace stroma {
void export_tensor(Napi::Env env, Napi::Object exports);   // binding/tensor.cc
void export_session(Napi::Env env, Napi::Object exports);  // binding/session.cc
void export_ranks(Napi::Env env, Napi::Object exports);    // binding/ranks.cc
void export_machine(Napi::Env env, Napi::Object exports);  // binding/machine.cc
}  // namespace stroma

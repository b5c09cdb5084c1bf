// Tiles on the CPU: n elements at flat pointers, without aliasing, on the calling thread. Of quantized values a tile
// begins with a block; absmax has one float for each block of 256, the last of which may be shorter.
#pragma once
#include <c10/util/BFloat16.h>

#include "kernels/dynamic_map.h"

namespace stroma {

// out[i] = map[code[i]] * absmax
void decode_signed(const uint8_t* code, const float* absmax, float* out, int64_t n);
void decode_unsigned(const uint8_t* code, const float* absmax, float* out, int64_t n);

// Overwrites absmax and code. keep_sign: see nearest_code.
void encode_signed(const float* x, float* absmax, uint8_t* code, int64_t n);
void encode_signed_keeping_sign(const float* x, float* absmax, uint8_t* code, int64_t n);
void encode_unsigned(const float* x, float* absmax, uint8_t* code, int64_t n);

// Rounds to nearest where To is the narrower one.
void convert(const c10::BFloat16* from, float* to, int64_t n);
void convert(const c10::BFloat16* from, double* to, int64_t n);
void convert(const double* from, float* to, int64_t n);
void convert(const float* from, double* to, int64_t n);
void convert(const float* from, c10::BFloat16* to, int64_t n);

}  // namespace stroma

// What SHA-256 (FIPS 180-4) does with a block of 64 bytes, in plain C++ and by the instructions that processors have for it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace graphopt {

// Takes blocks, one after the other, into the eight words of the state.
using Sha256Blocks = void (*)(uint32_t* state, const unsigned char* data, size_t blocks);

inline const uint32_t sha256_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

inline void sha256_plainly(uint32_t* state, const unsigned char* data, size_t blocks) {
  auto turned = [](uint32_t x, int by) { return x >> by | x << (32 - by); };
  for (; blocks; blocks--, data += 64) {
    uint32_t w[64];
    for (int i = 0; i < 16; i++) {
      const unsigned char* at = data + 4 * i;
      w[i] = uint32_t(at[0]) << 24 | uint32_t(at[1]) << 16 | uint32_t(at[2]) << 8 | at[3];
    }
    for (int i = 16; i < 64; i++) {
      uint32_t low = turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ w[i - 15] >> 3;
      uint32_t high = turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ w[i - 2] >> 10;
      w[i] = w[i - 16] + low + w[i - 7] + high;
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; i++) {
      uint32_t mixed = turned(e, 6) ^ turned(e, 11) ^ turned(e, 25);
      uint32_t first = h + mixed + ((e & f) ^ (~e & g)) + sha256_constants[i] + w[i];
      uint32_t second = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
    }
    const uint32_t more[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; i++) state[i] += more[i];
  }
}

#if defined(__x86_64__)

// The instructions keep the words a, b, e and f in one register, c, d, g and h in another, the first of them highest.
__attribute__((target("sha,sse4.1"))) inline void sha256_by_instructions(
    uint32_t* state, const unsigned char* data, size_t blocks) {
  auto words = [](const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); };
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  __m128i abef = _mm_set_epi32(int(state[0]), int(state[1]), int(state[4]), int(state[5]));
  __m128i cdgh = _mm_set_epi32(int(state[2]), int(state[3]), int(state[6]), int(state[7]));
  for (; blocks; blocks--, data += 64) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i w[4];
    for (int i = 0; i < 4; i++) w[i] = _mm_shuffle_epi8(words(data + 16 * i), big_endian);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {  // four words, which are four rounds
      __m128i &now = w[i % 4], &next = w[(i + 1) % 4], &third = w[(i + 2) % 4], &last = w[(i + 3) % 4];
      const __m128i sum = _mm_add_epi32(now, words(sha256_constants + 4 * i));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
      if (i < 12) {
        const __m128i seven_before = _mm_alignr_epi8(last, third, 4);
        now = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(now, next), seven_before), last);
      }
    }
    abef = _mm_add_epi32(abef, abef_before), cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  uint32_t high[4], low[4];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), abef);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), cdgh);
  const uint32_t all[8] = {high[3], high[2], low[3], low[2], high[1], high[0], low[1], low[0]};
  for (int i = 0; i < 8; i++) state[i] = all[i];
}

inline bool has_sha256_instructions() { return has_feature("sha_ni") && has_feature("sse4_1") && has_feature("ssse3"); }

// Clang before 16 knows these instructions only where the whole program may use them.
#elif defined(__aarch64__) && !defined(__AARCH64EB__) && \
    (!defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_SHA2))

#if defined(__clang__)
__attribute__((target("sha2")))
#else
__attribute__((target("+crypto")))
#endif
inline void sha256_by_instructions(uint32_t* state, const unsigned char* data, size_t blocks) {
  uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
  for (; blocks; blocks--, data += 64) {
    const uint32x4_t abcd_before = abcd, efgh_before = efgh;
    uint32x4_t w[4];
    for (int i = 0; i < 4; i++) w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * i)));
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {  // four words, which are four rounds
      uint32x4_t &now = w[i % 4], &next = w[(i + 1) % 4], &third = w[(i + 2) % 4], &last = w[(i + 3) % 4];
      const uint32x4_t sum = vaddq_u32(now, vld1q_u32(sha256_constants + 4 * i)), old = abcd;
      abcd = vsha256hq_u32(abcd, efgh, sum);
      efgh = vsha256h2q_u32(efgh, old, sum);
      if (i < 12) now = vsha256su1q_u32(vsha256su0q_u32(now, next), third, last);
    }
    abcd = vaddq_u32(abcd, abcd_before), efgh = vaddq_u32(efgh, efgh_before);
  }
  vst1q_u32(state, abcd), vst1q_u32(state + 4, efgh);
}

inline bool has_sha256_instructions() { return has_feature("sha2"); }

#else

inline void sha256_by_instructions(uint32_t* state, const unsigned char* data, size_t blocks) {
  sha256_plainly(state, data, blocks);
}

inline bool has_sha256_instructions() { return false; }

#endif

inline Sha256Blocks sha256_blocks() {
  static const Sha256Blocks fastest = has_sha256_instructions() ? sha256_by_instructions : sha256_plainly;
  return fastest;
}

}  // namespace graphopt

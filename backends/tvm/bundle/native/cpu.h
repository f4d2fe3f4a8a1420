// Which instruction-set extensions this processor has, by the names that Linux gives them.
#pragma once

#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#else
#include <sys/auxv.h>
#endif

namespace graphopt {

#if defined(__x86_64__)

inline const char* architecture() { return "x86_64"; }

// What the operating system keeps when it switches between threads (XCR0); 0 where it does not tell.
inline unsigned long long kept_registers() {
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long long>(high) << 32 | low;
}

inline bool has_feature(const std::string& name) {
  enum { eax, ebx, ecx, edx };
  static const struct { const char* name; unsigned leaf, part; int word, bit; } table[] = {
      {"sse2", 1, 0, edx, 26}, {"pni", 1, 0, ecx, 0}, {"ssse3", 1, 0, ecx, 9}, {"fma", 1, 0, ecx, 12},
      {"sse4_1", 1, 0, ecx, 19}, {"sse4_2", 1, 0, ecx, 20}, {"movbe", 1, 0, ecx, 22}, {"popcnt", 1, 0, ecx, 23},
      {"avx", 1, 0, ecx, 28}, {"f16c", 1, 0, ecx, 29}, {"abm", 0x80000001, 0, ecx, 5},
      {"xop", 0x80000001, 0, ecx, 11}, {"fma4", 0x80000001, 0, ecx, 16}, {"tbm", 0x80000001, 0, ecx, 21},
      {"bmi1", 7, 0, ebx, 3}, {"avx2", 7, 0, ebx, 5}, {"bmi2", 7, 0, ebx, 8}, {"avx512f", 7, 0, ebx, 16},
      {"avx512dq", 7, 0, ebx, 17}, {"avx512ifma", 7, 0, ebx, 21}, {"avx512cd", 7, 0, ebx, 28},
      {"sha_ni", 7, 0, ebx, 29}, {"avx512bw", 7, 0, ebx, 30}, {"avx512vl", 7, 0, ebx, 31}, {"avx512vbmi", 7, 0, ecx, 1},
      {"avx512_vbmi2", 7, 0, ecx, 6}, {"gfni", 7, 0, ecx, 8}, {"avx512_vnni", 7, 0, ecx, 11},
      {"avx512_bitalg", 7, 0, ecx, 12}, {"avx512_vpopcntdq", 7, 0, ecx, 14}, {"avx512_vp2intersect", 7, 0, edx, 8},
      {"amx_bf16", 7, 0, edx, 22}, {"avx512_fp16", 7, 0, edx, 23}, {"amx_tile", 7, 0, edx, 24},
      {"amx_int8", 7, 0, edx, 25}, {"avx_vnni", 7, 1, eax, 4}, {"avx512_bf16", 7, 1, eax, 5},
      {"amx_fp16", 7, 1, eax, 21}, {"avx_ifma", 7, 1, eax, 23}, {"avx_vnni_int8", 7, 1, edx, 4},
      {"avx_ne_convert", 7, 1, edx, 5}, {"avx_vnni_int16", 7, 1, edx, 10}};
  for (const auto& row : table) {
    if (name != row.name) continue;
    unsigned words[4];
    if (!__get_cpuid_count(row.leaf, row.part, words, words + 1, words + 2, words + 3)) return false;
    if (!(words[row.word] >> row.bit & 1)) return false;
    unsigned long long needed = 0;
    if (name.compare(0, 3, "avx") == 0 || name[0] == 'f' || name == "xop") needed = 0x6;
    if (name.compare(0, 6, "avx512") == 0) needed = 0xe6;
    if (name.compare(0, 3, "amx") == 0) needed = 0x60000;
    return (kept_registers() & needed) == needed;
  }
  return false;
}

#else

#if defined(__aarch64__)

inline const char* architecture() { return "aarch64"; }

struct Feature { const char* name; bool second; int bit; };
inline const Feature features[] = {
    {"fp", false, 0}, {"asimd", false, 1}, {"sha2", false, 6}, {"crc32", false, 7}, {"atomics", false, 8},
    {"fphp", false, 9}, {"asimdhp", false, 10}, {"asimdrdm", false, 12}, {"jscvt", false, 13}, {"fcma", false, 14}, {"lrcpc", false, 15},
    {"asimddp", false, 20}, {"sve", false, 22}, {"asimdfhm", false, 23}, {"sve2", true, 1}, {"i8mm", true, 13},
    {"bf16", true, 14}, {"sme", true, 23}, {"sme2", true, 37}};

#elif defined(__arm__)

inline const char* architecture() { return "armv7"; }

struct Feature { const char* name; bool second; int bit; };
inline const Feature features[] = {
    {"half", false, 1}, {"vfp", false, 6}, {"neon", false, 12}, {"vfpv3", false, 13}, {"vfpv4", false, 16},
    {"idiva", false, 17}, {"idivt", false, 18}, {"vfpd32", false, 19}};

#elif defined(__riscv) && __riscv_xlen == 64

inline const char* architecture() { return "riscv64"; }

struct Feature { const char* name; bool second; int bit; };
inline const Feature features[] = {{"a", false, 0}, {"c", false, 2}, {"d", false, 3}, {"f", false, 5}, {"m", false, 12}};

#else
#error "graphopt_run is for x86-64, ARM and RISC-V"
#endif

inline bool has_feature(const std::string& name) {
  for (const Feature& row : features)
    if (name == row.name) return static_cast<unsigned long long>(getauxval(row.second ? AT_HWCAP2 : AT_HWCAP)) >> row.bit & 1;
  return false;
}

#endif

}  // namespace graphopt

// SHA-256 (FIPS 180-4) of texts and files, as 64 hexadecimal digits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "sha256_blocks.h"

namespace graphopt {

class Sha256 {
 public:
  explicit Sha256(Sha256Blocks compress = sha256_blocks()) : compress_(compress) {}

  void update(const unsigned char* data, size_t size) {
    total_ += size;
    while (size) {
      if (filled_ == 0 && size >= sizeof block_) {
        size_t whole = size / sizeof block_;
        compress_(state_, data, whole);
        data += whole * sizeof block_, size -= whole * sizeof block_;
        continue;
      }
      size_t part = std::min(size, sizeof block_ - filled_);
      std::memcpy(block_ + filled_, data, part);
      filled_ += part, data += part, size -= part;
      if (filled_ == sizeof block_) {
        compress_(state_, block_, 1);
        filled_ = 0;
      }
    }
  }

  std::string hex() {
    uint64_t bits = total_ * 8;
    const unsigned char one = 0x80, zero = 0;
    update(&one, 1);
    while (filled_ != 56) update(&zero, 1);
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
    update(length, 8);
    std::string text;
    for (uint32_t word : state_) {
      char digits[9];
      std::snprintf(digits, sizeof digits, "%08x", static_cast<unsigned>(word));
      text += digits;
    }
    return text;
  }

 private:
  Sha256Blocks compress_;
  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char block_[64];
  size_t filled_ = 0;
  uint64_t total_ = 0;
};

inline std::string sha256(const std::string& text) {
  Sha256 sum;
  sum.update(reinterpret_cast<const unsigned char*>(text.data()), text.size());
  return sum.hex();
}

// The digest of a file; empty when it cannot be read.
inline std::string sha256_of_file(const std::string& path, Sha256Blocks compress = sha256_blocks()) {
  std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) return "";
  Sha256 sum(compress);
  std::vector<unsigned char> part(1 << 20);
  size_t size;
  while ((size = std::fread(part.data(), 1, part.size(), file.get())) > 0) sum.update(part.data(), size);
  return std::ferror(file.get()) ? "" : sum.hex();
}

}  // namespace graphopt

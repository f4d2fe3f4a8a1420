// A dense array in row-major order, in memory of its own.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "refused.h"

namespace graphopt {

constexpr size_t alignment = 64;  // what the compiled code expects of every address

struct Dtype {
  const char* name;      // as the manifest writes it
  const char* numpy;     // as a .npy file writes it; empty where there is no such
  unsigned char code;    // of DLPack
  unsigned char bits;
};

// The row of a dtype by its name in the manifest.
inline const Dtype& dtype_named(const std::string& name) {
  static const Dtype table[] = {
      {"float32", "<f4", 2, 32}, {"float64", "<f8", 2, 64}, {"float16", "<f2", 2, 16}, {"bfloat16", "", 4, 16},
      {"int8", "|i1", 0, 8}, {"int16", "<i2", 0, 16}, {"int32", "<i4", 0, 32}, {"int64", "<i8", 0, 64},
      {"uint8", "|u1", 1, 8}, {"uint16", "<u2", 1, 16}, {"uint32", "<u4", 1, 32}, {"uint64", "<u8", 1, 64},
      {"bool", "|b1", 6, 8}};
  for (const Dtype& row : table)
    if (name == row.name) return row;
  throw Refused("there is no dtype '" + name + "'");
}

// How many elements a shape has; refuses sizes below zero and more bytes than there can be.
inline size_t count_of(const std::vector<int64_t>& shape, size_t element_bytes) {
  size_t count = 1;
  for (int64_t size : shape) {
    size_t product;
    if (size < 0 || __builtin_mul_overflow(count, static_cast<size_t>(size), &product)) throw Refused("a shape is absurd");
    count = product;
  }
  size_t bytes;
  if (__builtin_mul_overflow(count, element_bytes, &bytes) || bytes > SIZE_MAX / 2) throw Refused("a shape is absurd");
  return count;
}

struct Array {
  std::string dtype;
  std::vector<int64_t> shape;
  std::shared_ptr<void> data;

  Array() = default;
  Array(const std::string& dtype, const std::vector<int64_t>& shape) : dtype(dtype), shape(shape) {
    void* memory = std::aligned_alloc(alignment, (bytes() / alignment + 1) * alignment);
    if (!memory) throw std::bad_alloc();
    data.reset(memory, std::free);
  }

  size_t bytes() const {
    size_t each = dtype_named(dtype).bits / 8;
    return count_of(shape, each) * each;
  }
};

}  // namespace graphopt

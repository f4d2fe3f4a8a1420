// Arrays in NumPy's .npy files: little-endian numbers in row-major order.
#pragma once

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "array.h"

namespace graphopt {

using File = std::unique_ptr<FILE, int (*)(FILE*)>;

// The text after `'name':` in the header of a .npy file.
inline std::string npy_field(const std::string& path, const std::string& header, const std::string& name) {
  size_t at = header.find("'" + name + "':");
  if (at == std::string::npos) throw Refused("'" + path + "' is no .npy file: its header has no '" + name + "'");
  at = header.find_first_not_of(' ', at + name.size() + 3);
  if (at == std::string::npos) throw Refused("'" + path + "' is no .npy file: its header is cut off");
  const char* ends = header[at] == '(' ? ")" : header[at] == '\'' ? "'" : ",}";
  size_t end = header.find_first_of(ends, at + 1);
  if (end == std::string::npos) throw Refused("'" + path + "' is no .npy file: its header is cut off");
  return header.substr(at, end - at);
}

inline std::vector<int64_t> npy_shape(const std::string& path, const std::string& text) {
  std::vector<int64_t> shape;
  for (size_t at = 0; at < text.size();) {
    size_t start = text.find_first_of("0123456789", at);
    if (start == std::string::npos) break;
    size_t end = text.find_first_not_of("0123456789", start);
    std::string digits = text.substr(start, end == std::string::npos ? end : end - start);
    if (digits.size() > 18) throw Refused("'" + path + "' has an absurd shape");
    shape.push_back(std::stoll(digits));
    at = end == std::string::npos ? text.size() : end;
  }
  return shape;
}

inline std::string npy_header(const std::string& path, FILE* file) {
  unsigned char start[12];
  if (std::fread(start, 1, 10, file) != 10 || std::memcmp(start, "\x93NUMPY", 6) != 0)
    throw Refused("'" + path + "' is no .npy file");
  size_t size = start[8] | start[9] << 8;
  if (start[6] >= 2) {
    if (std::fread(start + 10, 1, 2, file) != 2) throw Refused("'" + path + "' is cut off");
    size |= static_cast<size_t>(start[10]) << 16 | static_cast<size_t>(start[11]) << 24;
  }
  if (size > 1 << 20) throw Refused("'" + path + "' is no .npy file: its header has " + std::to_string(size) + " bytes");
  std::string header(size, '\0');
  if (std::fread(&header[0], 1, size, file) != size) throw Refused("'" + path + "' is cut off");
  return header;
}

inline Array read_npy(const std::string& path) {
  File file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw Refused("'" + path + "' cannot be read: " + std::strerror(errno));
  std::string header = npy_header(path, file.get());
  std::string written = npy_field(path, header, "descr").substr(1), dtype;
  for (const char* name : {"float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
                           "uint64", "bool"})
    if (written == dtype_named(name).numpy) dtype = name;
  if (dtype.empty()) throw Refused("'" + path + "' holds numbers of the type '" + written + "', which no model takes");
  if (npy_field(path, header, "fortran_order").compare(0, 5, "False") != 0)
    throw Refused("'" + path + "' is in column order: write it with numpy.ascontiguousarray");
  std::vector<int64_t> shape = npy_shape(path, npy_field(path, header, "shape"));
  long start = std::ftell(file.get());
  std::fseek(file.get(), 0, SEEK_END);
  size_t each = dtype_named(dtype).bits / 8, bytes = count_of(shape, each) * each;
  if (static_cast<size_t>(std::ftell(file.get()) - start) < bytes) throw Refused("'" + path + "' is cut off");
  std::fseek(file.get(), start, SEEK_SET);
  Array array(dtype, shape);
  if (std::fread(array.data.get(), 1, bytes, file.get()) != bytes) throw Refused("'" + path + "' is cut off");
  return array;
}

inline void write_npy(const std::string& path, const Array& array) {
  const char* written = dtype_named(array.dtype).numpy;
  if (!*written) throw Refused("a .npy file cannot hold " + array.dtype);
  std::string shape;
  for (int64_t size : array.shape) shape += std::to_string(size) + ", ";
  if (array.shape.size() > 1) shape.resize(shape.size() - 2);
  std::string header = std::string("{'descr': '") + written + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header += std::string(63 - (10 + header.size()) % 64, ' ') + '\n';
  const unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, static_cast<unsigned char>(header.size()),
                                   static_cast<unsigned char>(header.size() >> 8)};
  File file(std::fopen(path.c_str(), "wb"), std::fclose);
  bool whole = file && std::fwrite(start, 1, 10, file.get()) == 10 &&
               std::fwrite(header.data(), 1, header.size(), file.get()) == header.size() &&
               std::fwrite(array.data.get(), 1, array.bytes(), file.get()) == array.bytes() &&
               std::fclose(file.release()) == 0;
  if (!whole) throw Refused("'" + path + "' cannot be written: " + std::strerror(errno));
}

}  // namespace graphopt

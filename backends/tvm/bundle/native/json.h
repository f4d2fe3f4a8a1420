// A reader of JSON (RFC 8259) for manifests: numbers are 64-bit integers where they are written as such.
#pragma once

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "refused.h"

namespace graphopt {

struct Json {
  enum Kind { null, boolean, integer, real, text, list, object } kind = null;
  int64_t number = 0;
  double fraction = 0;
  std::string string;
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> fields;

  const Json* find(const std::string& name) const {
    for (const auto& field : fields)
      if (field.first == name) return &field.second;
    return nullptr;
  }

  // The field of an object, which has to be there and of this kind.
  const Json& at(const std::string& name, Kind wanted) const {
    const Json* found = find(name);
    if (!found || found->kind != wanted) throw Refused("the manifest is damaged: '" + name + "' is missing or wrong");
    return *found;
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& source) : source_(source) {}

  Json whole() {
    Json value = read(0);
    skip();
    if (at_ != source_.size()) fail();
    return value;
  }

 private:
  [[noreturn]] void fail() const { throw Refused("the manifest is damaged: no JSON at byte " + std::to_string(at_)); }

  char peek() const { return at_ < source_.size() ? source_[at_] : '\0'; }

  void skip() {
    while (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r') at_++;
  }

  bool take(char wanted) {
    skip();
    if (peek() != wanted) return false;
    at_++;
    return true;
  }

  void word(const char* wanted) {
    for (; *wanted; wanted++, at_++)
      if (peek() != *wanted) fail();
  }

  Json read(int depth) {
    if (depth > 64) fail();
    skip();
    Json value;
    switch (peek()) {
      case '{': return object(depth);
      case '[': return list(depth);
      case '"': value.kind = Json::text; value.string = text(); return value;
      case 't': word("true"); value.kind = Json::boolean; value.number = 1; return value;
      case 'f': word("false"); value.kind = Json::boolean; return value;
      case 'n': word("null"); return value;
      default: return numeral();
    }
  }

  Json object(int depth) {
    Json value;
    value.kind = Json::object;
    take('{');
    if (take('}')) return value;
    do {
      skip();
      if (peek() != '"') fail();
      std::string name = text();
      if (!take(':') || value.find(name)) fail();
      value.fields.emplace_back(name, read(depth + 1));
    } while (take(','));
    if (!take('}')) fail();
    return value;
  }

  Json list(int depth) {
    Json value;
    value.kind = Json::list;
    take('[');
    if (take(']')) return value;
    do value.items.push_back(read(depth + 1));
    while (take(','));
    if (!take(']')) fail();
    return value;
  }

  Json numeral() {
    size_t start = at_;
    bool whole = true;
    for (;; at_++) {
      char c = peek();
      if (c == '.' || c == 'e' || c == 'E' || c == '+') whole = false;
      else if (c != '-' && (c < '0' || c > '9')) break;
    }
    std::string digits = source_.substr(start, at_ - start);
    char* end = nullptr;
    Json value;
    errno = 0;
    value.kind = whole ? Json::integer : Json::real;
    if (whole) value.number = std::strtoll(digits.c_str(), &end, 10);
    else value.fraction = std::strtod(digits.c_str(), &end);
    bool beyond = errno && (whole || std::abs(value.fraction) > 1);  // a real number may be too close to zero
    if (digits.empty() || *end || beyond) fail();
    return value;
  }

  std::string text() {
    std::string result;
    for (at_++; peek() != '"'; at_++) {
      if (at_ >= source_.size() || static_cast<unsigned char>(peek()) < 0x20) fail();
      if (peek() != '\\') {
        result += peek();
        continue;
      }
      at_++;
      static const std::string names = "\"\\/bfnrt", values = "\"\\/\b\f\n\r\t";
      size_t which = peek() ? names.find(peek()) : std::string::npos;
      if (which != std::string::npos) result += values[which];
      else if (peek() == 'u') append(result, unit());
      else fail();
    }
    at_++;
    return result;
  }

  // One \uXXXX, or two that stand for one character beyond the first plane.
  uint32_t unit() {
    uint32_t code = digits();
    if (code < 0xd800 || code >= 0xdc00) return code;
    at_++;
    word("\\");
    if (peek() != 'u') fail();
    uint32_t low = digits();
    if (low < 0xdc00 || low >= 0xe000) fail();
    return 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }

  uint32_t digits() {
    uint32_t code = 0;
    for (int i = 0; i < 4; i++) {
      char c = ++at_ < source_.size() ? source_[at_] : '\0';
      const std::string all = "0123456789abcdef";
      size_t digit = c ? all.find(static_cast<char>(c | 0x20)) : std::string::npos;
      if (digit == std::string::npos) fail();
      code = code * 16 + static_cast<uint32_t>(digit);
    }
    return code;
  }

  static void append(std::string& text, uint32_t code) {
    if (code < 0x80) {
      text += static_cast<char>(code);
      return;
    }
    int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const unsigned heads[] = {0, 0xc0, 0xe0, 0xf0};
    text += static_cast<char>(heads[more] | code >> (6 * more));
    while (more--) text += static_cast<char>(0x80 | (code >> (6 * more) & 0x3f));
  }

  const std::string& source_;
  size_t at_ = 0;
};

}  // namespace graphopt

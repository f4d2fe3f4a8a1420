// Sizes that depend on names, such as `2*batch+1`, and conditions on them, such as `width%8 == 0`.
//
// The manifest writes them as Python does: + - * // % **, comparisons, max(...) and min(...).
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <map>
#include <string>

#include "refused.h"

namespace graphopt {

using Sizes = std::map<std::string, int64_t>;

class SizeReader {
 public:
  SizeReader(const std::string& source, const Sizes& sizes) : source_(source), sizes_(sizes) {}

  int64_t whole() {
    int64_t left = sum();
    for (const char* sign : {"==", "!=", "<=", ">=", "<", ">"}) {
      if (!take(sign)) continue;
      int64_t right = sum();
      std::string s = sign;
      left = s == "==" ? left == right : s == "!=" ? left != right : s == "<=" ? left <= right
           : s == ">=" ? left >= right : s == "<" ? left < right : left > right;
      break;
    }
    skip();
    if (at_ != source_.size()) fail();
    return left;
  }

 private:
  [[noreturn]] void fail() const { throw Refused("the manifest is damaged: '" + source_ + "' is no size"); }

  void skip() {
    while (at_ < source_.size() && source_[at_] == ' ') at_++;
  }

  bool take(const std::string& sign) {
    skip();
    if (source_.compare(at_, sign.size(), sign) != 0) return false;
    at_ += sign.size();
    return true;
  }

  // The value is read after the flag was made, which also makes the value.
  int64_t checked(bool overflows, const int64_t& value) const {
    if (overflows) fail();
    return value;
  }

  int64_t sum() {
    int64_t value = product(), result;
    for (;;) {
      if (take("+")) value = checked(__builtin_add_overflow(value, product(), &result), result);
      else if (take("-")) value = checked(__builtin_sub_overflow(value, product(), &result), result);
      else return value;
    }
  }

  int64_t product() {
    int64_t value = power(), result;
    for (;;) {
      if (take("//")) value = floor_divided(value, power());
      else if (take("%")) {
        int64_t by = power();
        value -= floor_divided(value, by) * by;
      } else if (source_.compare(at_, 2, "**") != 0 && take("*")) {
        value = checked(__builtin_mul_overflow(value, power(), &result), result);
      } else return value;
    }
  }

  int64_t floor_divided(int64_t value, int64_t by) const {
    if (by == 0 || (by == -1 && value == INT64_MIN)) fail();
    return value / by - (value % by != 0 && (value < 0) != (by < 0));
  }

  int64_t power() {
    if (depth_++ > 64) fail();
    int64_t base = atom(), value = 1;
    if (take("**")) {
      int64_t exponent = power();
      if (exponent < 0 || exponent > 63) fail();
      while (exponent--) checked(__builtin_mul_overflow(value, base, &value), 0);
      base = value;
    }
    depth_--;
    return base;
  }

  int64_t atom() {
    if (take("-")) {
      int64_t result;
      return checked(__builtin_sub_overflow(int64_t(0), power(), &result), result);
    }
    if (take("(")) return closed(sum());
    skip();
    size_t start = at_;
    while (at_ < source_.size() && (std::isalnum(static_cast<unsigned char>(source_[at_])) || source_[at_] == '_')) at_++;
    std::string word = source_.substr(start, at_ - start);
    if (word.empty()) fail();
    if (std::isdigit(static_cast<unsigned char>(word[0]))) return literal(word);
    if (take("(")) return extreme(word);
    auto found = sizes_.find(word);
    if (found == sizes_.end()) fail();
    return found->second;
  }

  int64_t literal(const std::string& word) const {
    if (word.size() > 18 || word.find_first_not_of("0123456789") != std::string::npos) fail();
    return std::stoll(word);
  }

  int64_t extreme(const std::string& name) {
    if (depth_++ > 64 || (name != "max" && name != "min" && name != "Max" && name != "Min")) fail();
    int64_t value = sum();
    while (take(",")) value = name[1] == 'a' ? std::max(value, sum()) : std::min(value, sum());
    depth_--;
    return closed(value);
  }

  int64_t closed(int64_t value) {
    if (!take(")")) fail();
    return value;
  }

  const std::string& source_;
  const Sizes& sizes_;
  size_t at_ = 0;
  int depth_ = 0;
};

inline int64_t size_of(const std::string& expression, const Sizes& sizes) { return SizeReader(expression, sizes).whole(); }

}  // namespace graphopt

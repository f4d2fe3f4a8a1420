// What every part of the loader throws: one line that says which file or input, and why.
#pragma once

#include <stdexcept>
#include <string>

namespace graphopt {

struct Refused : std::runtime_error {
  explicit Refused(const std::string& what) : std::runtime_error(what) {}
};

}  // namespace graphopt

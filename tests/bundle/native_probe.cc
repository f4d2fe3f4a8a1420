// Reads questions from stdin, one a line, and answers each with one line, for test_native.py:
//     sha256 FILE | plainly FILE | size EXPRESSION|NAME=VALUE,... | json FILE | npy FILE COPY | feature NAME
#include <fstream>
#include <iostream>
#include <sstream>

#include "cpu.h"
#include "json.h"
#include "npy.h"
#include "sha256.h"
#include "sizes.h"

using namespace graphopt;

static void shown(const Json& value, std::string& text) {
  if (value.kind == Json::null) text += "null";
  if (value.kind == Json::boolean) text += value.number ? "true" : "false";
  if (value.kind == Json::integer) text += std::to_string(value.number);
  if (value.kind == Json::real) text += "real";
  if (value.kind == Json::text) {
    text += '"';
    for (unsigned char c : value.string) text += std::to_string(static_cast<int>(c)) + " ";
    text += '"';
  }
  if (value.kind == Json::list) {
    text += '[';
    for (const Json& item : value.items) shown(item, text), text += ',';
    text += ']';
  }
  if (value.kind == Json::object) {
    text += '{';
    for (const auto& field : value.fields) {
      Json name;
      name.kind = Json::text, name.string = field.first;
      shown(name, text), text += ':', shown(field.second, text), text += ',';
    }
    text += '}';
  }
}

static std::string answer(const std::string& what, std::istream& rest) {
  std::string first, second;
  if (what == "sha256") return rest >> first, sha256_of_file(first);
  if (what == "plainly") return rest >> first, sha256_of_file(first, sha256_plainly);
  if (what == "feature") return rest >> first, has_feature(first) ? "yes" : "no";
  if (what == "npy") {
    rest >> first >> second;
    write_npy(second, read_npy(first));
    return "done";
  }
  if (what == "json") {
    rest >> first;
    std::ifstream file(first, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    std::string source = text.str();
    shown(JsonReader(source).whole(), second);
    return second;
  }
  std::getline(rest >> std::ws, first, '|');
  Sizes sizes;
  while (std::getline(rest, second, ',')) sizes[second.substr(0, second.find('='))] = std::stoll(second.substr(second.find('=') + 1));
  return std::to_string(size_of(first, sizes));
}

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream rest(line);
    std::string what;
    rest >> what;
    try {
      std::cout << answer(what, rest) << "\n";
    } catch (const Refused& error) {
      std::cout << "refused: " << error.what() << "\n";
    }
  }
}

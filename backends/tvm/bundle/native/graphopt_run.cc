// graphopt_run BUNDLE [--input NAME=FILE.npy]... [-o FOLDER] [--bench ROUNDS]
//
// Verifies a bundle, runs it on arrays and writes each output as FOLDER/NAME.npy. Without inputs it verifies and tells
// what the model takes. A refusal is one line on stderr and exit code 2.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <iostream>

#include "graphopt.h"

namespace {

struct Options {
  std::string bundle, output;
  std::map<std::string, std::string> inputs;
  int rounds = 0;
};

Options parsed(int count, char** words) {
  Options options;
  for (int i = 1; i < count; i++) {
    std::string word = words[i];
    bool takes = word == "--input" || word == "-i" || word == "-o" || word == "--output" || word == "--bench";
    if (takes && i + 1 == count) throw graphopt::Refused(word + " takes a value");
    if (word == "--input" || word == "-i") {
      std::string pair = words[++i];
      size_t at = pair.find('=');
      if (at == std::string::npos) throw graphopt::Refused("--input takes NAME=FILE.npy, not '" + pair + "'");
      if (!options.inputs.emplace(pair.substr(0, at), pair.substr(at + 1)).second)
        throw graphopt::Refused("the input '" + pair.substr(0, at) + "' is given twice");
    } else if (word == "-o" || word == "--output") {
      options.output = words[++i];
    } else if (word == "--bench") {
      options.rounds = std::atoi(words[++i]);
      if (options.rounds < 1) throw graphopt::Refused("--bench takes a number of rounds");
    } else if (word[0] == '-' || !options.bundle.empty()) {
      throw graphopt::Refused("what is '" + word + "'? graphopt_run BUNDLE [--input NAME=FILE.npy]... [-o FOLDER]");
    } else {
      options.bundle = word;
    }
  }
  if (options.bundle.empty()) throw graphopt::Refused("no bundle is named: graphopt_run BUNDLE [--input NAME=FILE.npy]...");
  return options;
}

void tell(const char* what, const std::vector<graphopt::TensorSpec>& specs) {
  for (const auto& spec : specs) {
    std::cout << what << " " << spec.name << ": " << spec.dtype << "[";
    for (size_t i = 0; i < spec.dims.size(); i++) {
      if (i) std::cout << ", ";
      if (spec.dims[i].kind == graphopt::Json::text) std::cout << spec.dims[i].string;
      else std::cout << spec.dims[i].number;
    }
    std::cout << "]\n";
  }
}

std::vector<graphopt::Array> arrays_of(const Options& options, const graphopt::Bundle& bundle) {
  std::vector<graphopt::Array> arrays;
  for (const auto& spec : bundle.inputs()) {
    auto found = options.inputs.find(spec.name);
    if (found == options.inputs.end()) throw graphopt::Refused("the input '" + spec.name + "' is missing");
    arrays.push_back(graphopt::read_npy(found->second));
  }
  if (options.inputs.size() != arrays.size()) throw graphopt::Refused("more inputs are given than the model takes");
  return arrays;
}

// A name as that of a file: other letters become '_'.
std::string file_name(std::string name, size_t number) {
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '_' && c != '-') c = '_';
  return name.empty() ? "output_" + std::to_string(number) : name;
}

void write(const std::string& folder, const graphopt::Bundle& bundle, const std::vector<graphopt::Array>& results) {
  if (mkdir(folder.c_str(), 0777) != 0 && errno != EEXIST)
    throw graphopt::Refused("'" + folder + "' cannot be made: " + std::strerror(errno));
  std::map<std::string, size_t> taken;
  for (size_t i = 0; i < results.size(); i++) {
    std::string name = file_name(bundle.outputs()[i].name, i);
    if (!taken.emplace(name, i).second) name += "_" + std::to_string(i);
    graphopt::write_npy(folder + "/" + name + ".npy", results[i]);
  }
}

void bench(graphopt::Bundle& bundle, const std::vector<graphopt::Array>& arrays, int rounds) {
  std::vector<double> times;
  for (int i = 0; i < rounds; i++) {
    auto start = std::chrono::steady_clock::now();
    bundle.run(arrays);
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  std::cout << "median " << times[times.size() / 2] << " ms, fastest " << times[0] << " ms, " << rounds << " rounds\n";
}

// TVM's runtime reports every executable that it loads as a warning on stderr, where it would be taken for one.
class Quiet {
 public:
  Quiet() : kept_(dup(STDERR_FILENO)), nowhere_(open("/dev/null", O_WRONLY | O_CLOEXEC)) {
    if (kept_ >= 0 && nowhere_ >= 0) dup2(nowhere_, STDERR_FILENO);
  }
  ~Quiet() {
    if (kept_ >= 0 && nowhere_ >= 0) dup2(kept_, STDERR_FILENO);
    if (kept_ >= 0) close(kept_);
    if (nowhere_ >= 0) close(nowhere_);
  }

 private:
  int kept_, nowhere_;
};

graphopt::Bundle loaded(const std::string& folder) {
  Quiet quiet;
  return graphopt::Bundle(folder);
}

int run(int count, char** words) {
  Options options = parsed(count, words);
  graphopt::Bundle bundle = loaded(options.bundle);
  if (options.inputs.empty() && options.output.empty() && !options.rounds) {
    tell("input", bundle.inputs());
    tell("output", bundle.outputs());
    return 0;
  }
  std::vector<graphopt::Array> arrays = arrays_of(options, bundle), results = bundle.run(arrays);
  if (options.rounds) bench(bundle, arrays, options.rounds);
  if (!options.output.empty()) write(options.output, bundle, results);
  return 0;
}

}  // namespace

int main(int count, char** words) {
  try {
    return run(count, words);
  } catch (const std::exception& error) {
    std::cerr << "graphopt_run: " << error.what() << "\n";
    return 2;
  }
}

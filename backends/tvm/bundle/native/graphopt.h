// Load, verify and run a compiled model: a folder that `graphopt build` wrote.
//
//     graphopt::Bundle bundle("bundle");
//     std::vector<graphopt::Array> outputs = bundle.run({graphopt::read_npy("x.npy")});
//
// The constructor throws `graphopt::Refused`, with one line that says why, when any file differs from what was built,
// or when this machine cannot run the code; nothing of the bundle runs before that. One bundle is for one thread at a
// time. Needs the two C headers of tvm_ffi (in `include/`), C++17 and libdl.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <sstream>

#include "cpu.h"
#include "json.h"
#include "npy.h"
#include "runtime.h"
#include "sha256.h"
#include "sizes.h"

namespace graphopt {

constexpr int64_t schema = 4;  // of the manifests that this reads

struct TensorSpec {
  std::string name, dtype;
  std::vector<Json> dims;  // numbers, or texts over named sizes
};

class Bundle {
 public:
  explicit Bundle(const std::string& folder) : folder_(folder), manifest_(sealed_manifest()) {
    require_format();
    require_machine();
    require_files();
    read_signature();
    load();
  }
  Bundle(const Bundle&) = delete;
  Bundle& operator=(const Bundle&) = delete;
  ~Bundle() {
    main_ = Handle(), machine_ = Handle();
    try {
      if (stop_.is_object()) call(stop_, {});
    } catch (const Refused&) {
    }
  }

  const std::vector<TensorSpec>& inputs() const { return inputs_; }
  const std::vector<TensorSpec>& outputs() const { return outputs_; }

  // Throws Refused when number, dtype or shape of the inputs differ from what the model was built for.
  std::vector<Array> run(const std::vector<Array>& arrays) {
    check(arrays);
    std::vector<Handle> tensors;
    std::vector<const Handle*> arguments;
    for (const Array& array : arrays) tensors.push_back(tensor(array.dtype, array.shape, array.data.get(), array.data));
    for (const Handle& each : tensors) arguments.push_back(&each);
    for (const Handle& each : weights_) arguments.push_back(&each);
    Handle result = call(main_, arguments);
    std::vector<Array> results;
    for (size_t i = 0; i < outputs_.size(); i++) {
      Handle number = Handle::of(static_cast<int64_t>(i));
      results.push_back(copied(call(global("ffi.ArrayGetItem"), {&result, &number})));
    }
    return results;
  }

 private:
  [[noreturn]] void refuse(const std::string& why) const { throw Refused("'" + folder_ + "' " + why); }

  std::string text_of(const std::string& name) const {
    std::ifstream file(folder_ + "/" + name, std::ios::binary);
    std::stringstream text;
    if (!file || !(text << file.rdbuf())) refuse("is not a bundle, or was altered: " + name + " is missing or empty");
    return text.str();
  }

  Json sealed_manifest() const {
    std::string text = text_of("manifest.json");
    if (text_of("manifest.sha256") != sha256(text) + "  manifest.json\n")
      refuse("was altered: manifest.json is not the file that was saved (its SHA-256 differs)");
    return JsonReader(text).whole();
  }

  void require_format() const {
    const Json* format = manifest_.find("schema");
    if (!format || format->kind != Json::integer || format->number != schema)
      refuse("has a format of another version of graphopt: this program reads format " + std::to_string(schema));
    std::string backend = manifest_.at("backend", Json::text).string;
    if (backend != "tvm") refuse("was made by the backend '" + backend + "', this program runs those of 'tvm'");
  }

  void require_machine() const {
    const Json& target = manifest_.at("target", Json::object);
    std::string arch = target.at("arch", Json::text).string, missing;
    std::string code = "is code for " + arch + " " + target.at("cpu", Json::text).string;
    if (target.at("kind", Json::text).string == "cuda") refuse("is code for a GPU (" + arch + "): run it from Python");
    if (arch != architecture()) refuse(code + ", this machine is " + architecture());
    for (const Json& feature : manifest_.at("needs", Json::list).items)
      if (!has_feature(feature.string)) missing += (missing.empty() ? "" : ", ") + feature.string;
    if (!missing.empty()) refuse(code + " and may use " + missing + ", which this processor does not have");
  }

  void require_files() const {
    for (const auto& file : manifest_.at("sha256", Json::object).fields) {
      if (file.first.empty() || file.first[0] == '/' || file.first.find("..") != std::string::npos)
        refuse("has a damaged manifest: it lists the file '" + file.first + "'");
      std::string digest = sha256_of_file(folder_ + "/" + file.first);
      if (digest.empty()) refuse("was altered: " + file.first + " is missing");
      if (digest != file.second.string)
        refuse("was altered: " + file.first + " is not the file that was saved (its SHA-256 differs)");
    }
  }

  void read_signature() {
    const Json& signature = manifest_.at("signature", Json::object);
    for (auto side : {std::make_pair("inputs", &inputs_), std::make_pair("outputs", &outputs_)})
      for (const Json& row : signature.at(side.first, Json::list).items)
        if (!row.find("name")) refuse("has a damaged manifest: a value of the signature has no name");
        else if (row.find("dtype"))  // the others are constants, which are part of the code
          side.second->push_back({row.at("name", Json::text).string, row.at("dtype", Json::text).string,
                                  row.at("dims", Json::list).items});
  }

  void load() {
    require_listed("lib/libtvm_ffi.so"), require_listed("lib/libtvm_runtime.so"), require_listed("model.so");
    require_listed("lib/libtvm_runtime_extra.so");
    std::string root = folder_.empty() || folder_[0] != '/' ? "./" + folder_ : folder_;
    runtime(root + "/lib");
    std::string path = root + "/model.so";
    Handle file = Handle::of(path.c_str());
    Handle module = call(global("ffi.ModuleLoadFromFile"), {&file});
    map_weights();
    int64_t count = manifest_.at("threads", Json::integer).number;
    if (count < 1 || count > 1024) refuse("has a damaged manifest: it asks for " + std::to_string(count) + " threads");
    Handle threads = Handle::of(count), cpu = Handle::of(kDLCPU), zero = Handle::of(int64_t(0));
    Handle pooled = Handle::of(int64_t(2));
    call(function_of(module, "graphopt_start_threads"), {&threads});
    stop_ = function_of(module, "graphopt_stop_threads");
    machine_ = call(function_of(module, "vm_load_executable"), {});
    call(function_of(machine_, "vm_initialization"), {&cpu, &zero, &pooled});
    check_weights();
    main_ = function_of(machine_, "main");
  }

  // The code does not look at the weights again: sizes that are not its own would have it read beyond them.
  void check_weights() const {
    std::vector<const Handle*> all;
    for (const Handle& weight : weights_) all.push_back(&weight);
    try {
      call(function_of(machine_, "check_weights"), all);
    } catch (const Refused& error) {
      refuse(std::string("has a damaged manifest: its weights are not those of the code (") + error.what() + ")");
    }
  }

  void require_listed(const std::string& name) const {
    if (!manifest_.at("sha256", Json::object).find(name)) refuse("has a damaged manifest: it does not list " + name);
  }

  // The file's pages, private to the process: they are read when they are used, and nothing can change the file.
  void map_weights() {
    const auto& rows = manifest_.at("weights", Json::list).items;
    std::string name = manifest_.at("weights_file", Json::text).string;
    require_listed(name);
    int file = open((folder_ + "/" + name).c_str(), O_RDONLY | O_CLOEXEC);
    struct stat facts;
    if (file < 0 || fstat(file, &facts) != 0) refuse("was altered: " + name + " cannot be read");
    size_t size = static_cast<size_t>(facts.st_size);
    void* start = size ? mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0) : nullptr;
    close(file);
    if (start == MAP_FAILED) refuse("cannot be mapped into memory: " + name + " has " + std::to_string(size) + " bytes");
    std::shared_ptr<void> pages(start, [size](void* at) {
      if (at) munmap(at, size);
    });
    size_t end = 0;
    for (const Json& row : rows) weights_.push_back(weight(row, static_cast<char*>(start), size, pages, end));
    if (!rows.empty() && end != size) refuse("has a damaged manifest: weights do not lie one after the other");
  }

  // `end` is where the weight before ends, 0 for the first, and then where this one does.
  Handle weight(const Json& row, char* start, size_t size, const std::shared_ptr<void>& pages, size_t& end) const {
    Array like;
    like.dtype = row.at("dtype", Json::text).string;
    for (const Json& dim : row.at("shape", Json::list).items) like.shape.push_back(dim.number);
    int64_t offset = row.at("offset", Json::integer).number;
    if (offset < 0 || offset % alignment || static_cast<size_t>(offset) > size || like.bytes() > size - offset)
      refuse("has a damaged manifest: a weight lies beyond its file");
    if (end && static_cast<size_t>(offset) != (end + alignment - 1) / alignment * alignment)
      refuse("has a damaged manifest: weights do not lie one after the other");
    end = static_cast<size_t>(offset) + like.bytes();
    return tensor(like.dtype, like.shape, start + offset, pages);
  }

  void check(const std::vector<Array>& arrays) const {
    if (arrays.size() != inputs_.size())
      throw Refused("the model takes " + std::to_string(inputs_.size()) + " inputs, " + std::to_string(arrays.size()) +
                    " were given");
    Sizes sizes;
    for (size_t i = 0; i < arrays.size(); i++) check_plain(inputs_[i], arrays[i], sizes);
    for (size_t i = 0; i < arrays.size(); i++) check_expressions(inputs_[i], arrays[i], sizes);
    for (const Json& condition : manifest_.at("signature", Json::object).at("conditions", Json::list).items)
      if (!size_of(condition.string, sizes)) throw Refused("the model is for sizes with " + condition.string);
  }

  // Dtype, rank, fixed sizes, and sizes that are a name alone or a multiple of one; these become known.
  void check_plain(const TensorSpec& spec, const Array& array, Sizes& sizes) const {
    if (array.dtype != spec.dtype)
      throw Refused("input '" + spec.name + "' has dtype " + array.dtype + ", the model takes " + spec.dtype);
    if (array.shape.size() != spec.dims.size())
      throw Refused("input '" + spec.name + "' has " + std::to_string(array.shape.size()) + " axes, the model takes " +
                    std::to_string(spec.dims.size()));
    const Json& ranges = manifest_.at("signature", Json::object).at("ranges", Json::object);
    for (size_t axis = 0; axis < spec.dims.size(); axis++) {
      const Json& dim = spec.dims[axis];
      int64_t size = array.shape[axis];
      std::string place = "input '" + spec.name + "' has size " + std::to_string(size) + " at axis " + std::to_string(axis);
      if (dim.kind == Json::integer && dim.number != size)
        throw Refused(place + ", the model takes " + std::to_string(dim.number));
      const Json* range = dim.kind == Json::text ? ranges.find(dim.string) : nullptr;
      if (!range) continue;
      if (range->items.size() != 2) refuse("has a damaged manifest: the range of '" + dim.string + "'");
      const Json &low = range->items[0], &high = range->items[1];
      if (size < low.number || (high.kind == Json::integer && size > high.number))
        throw Refused(place + ", which is out of the range of '" + dim.string + "'");
      if (sizes.emplace(dim.string, size).first->second != size)
        throw Refused(place + ", another input has " + dim.string + "=" + std::to_string(sizes[dim.string]));
    }
  }

  void check_expressions(const TensorSpec& spec, const Array& array, Sizes& sizes) const {
    const Json& ranges = manifest_.at("signature", Json::object).at("ranges", Json::object);
    for (size_t axis = 0; axis < spec.dims.size(); axis++) {
      const Json& dim = spec.dims[axis];
      if (dim.kind != Json::text || ranges.find(dim.string)) continue;
      int64_t size = array.shape[axis];
      size_t star = dim.string.find('*');
      std::string name = star == std::string::npos ? "" : dim.string.substr(star + 1);
      bool multiple = star > 0 && star < 10 && dim.string.find_first_not_of("0123456789") == star;
      if (multiple && ranges.find(name) && !sizes.count(name)) {
        int64_t factor = std::stoll(dim.string.substr(0, star));
        if (factor > 0) sizes[name] = size / factor;
      }
      if (size_of(dim.string, sizes) != size)
        throw Refused("input '" + spec.name + "' has size " + std::to_string(size) + " at axis " + std::to_string(axis) +
                      ", the model takes " + dim.string);
    }
  }

  std::string folder_;
  Json manifest_;
  std::vector<TensorSpec> inputs_, outputs_;
  std::vector<Handle> weights_;
  Handle machine_, main_, stop_;
};

}  // namespace graphopt

// TVM's runtime, loaded from a bundle by path and called through its C interface.
#pragma once

#include <dlfcn.h>
#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "array.h"

namespace graphopt {

// The functions of libtvm_ffi.so that are used here.
struct Interface {
  decltype(&TVMFFIFunctionGetGlobal) get_global;
  decltype(&TVMFFIFunctionCall) call;
  decltype(&TVMFFIObjectDecRef) release;
  decltype(&TVMFFITensorFromDLPack) tensor;
  decltype(&TVMFFIErrorMoveFromRaised) raised;
};

inline void* open_library(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (!library) throw Refused("'" + path + "' does not load: " + dlerror());
  return library;
}

template <typename Function>
void find_function(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw Refused(std::string("the runtime has no function ") + name);
}

// The runtime of the first bundle that is loaded; other bundles of the process use it too.
inline const Interface& runtime(const std::string& folder = "") {
  static const Interface interface = [&] {
    Interface found;
    void* library = open_library(folder + "/libtvm_ffi.so");
    find_function(library, "TVMFFIFunctionGetGlobal", found.get_global);
    find_function(library, "TVMFFIFunctionCall", found.call);
    find_function(library, "TVMFFIObjectDecRef", found.release);
    find_function(library, "TVMFFITensorFromDLPack", found.tensor);
    find_function(library, "TVMFFIErrorMoveFromRaised", found.raised);
    open_library(folder + "/libtvm_runtime.so");
    open_library(folder + "/libtvm_runtime_extra.so");
    return found;
  }();
  return interface;
}

// A value of the runtime: nothing, a number, or an object that is released with it.
class Handle {
 public:
  Handle() { value_ = {}; }
  explicit Handle(void* object, int32_t type) : Handle() { value_.v_ptr = object, value_.type_index = type; }
  Handle(Handle&& other) noexcept : value_(std::exchange(other.value_, TVMFFIAny{})) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  ~Handle() {
    if (is_object()) runtime().release(value_.v_obj);
  }

  static Handle of(int64_t number) {
    Handle handle;
    handle.value_.type_index = kTVMFFIInt, handle.value_.v_int64 = number;
    return handle;
  }
  static Handle of(const char* text) { return Handle(const_cast<char*>(text), kTVMFFIRawStr); }

  bool is_object() const { return value_.type_index >= kTVMFFIStaticObjectBegin; }
  TVMFFIAny* raw() { return &value_; }
  const TVMFFIAny& value() const { return value_; }

 private:
  TVMFFIAny value_;
};

inline std::string raised_error() {
  void* error = nullptr;
  runtime().raised(&error);
  if (!error) return "an unknown error";
  Handle owner(error, kTVMFFIError);
  const TVMFFIByteArray& message = TVMFFIErrorGetCellPtr(error)->message;
  std::string text(message.data, message.size);
  return text.substr(0, text.find('\n'));
}

inline Handle call(const Handle& function, const std::vector<const Handle*>& arguments) {
  if (function.value().type_index != kTVMFFIFunction) throw Refused("the code lacks a function");
  std::vector<TVMFFIAny> values;
  for (const Handle* argument : arguments) values.push_back(argument->value());
  Handle result;
  int status = runtime().call(function.value().v_ptr, values.data(), static_cast<int32_t>(values.size()), result.raw());
  if (status) throw Refused(raised_error());
  return result;
}

inline Handle global(const std::string& name) {
  TVMFFIByteArray key{name.data(), name.size()};
  void* function = nullptr;
  if (runtime().get_global(&key, &function) || !function) throw Refused("the runtime has no function " + name);
  return Handle(function, kTVMFFIFunction);
}

inline Handle function_of(const Handle& module, const char* name) {
  Handle text = Handle::of(name), imports = Handle::of(int64_t(1));
  imports.raw()->type_index = kTVMFFIBool;
  return call(global("ffi.ModuleGetFunction"), {&module, &text, &imports});
}

// A tensor over memory that `owner` keeps.
inline Handle tensor(const std::string& dtype, const std::vector<int64_t>& shape, void* data, std::shared_ptr<void> owner) {
  struct Kept {
    DLManagedTensor managed;
    std::vector<int64_t> shape, strides;
    std::shared_ptr<void> owner;
  };
  const Dtype& row = dtype_named(dtype);
  Kept* kept = new Kept{{}, shape, shape, std::move(owner)};
  int64_t step = 1;
  for (size_t axis = shape.size(); axis-- > 0; step *= shape[axis]) kept->strides[axis] = step;
  kept->managed.dl_tensor = {data, {kDLCPU, 0}, static_cast<int32_t>(shape.size()), {row.code, row.bits, 1},
                             kept->shape.data(), kept->strides.data(), 0};
  kept->managed.manager_ctx = kept;
  kept->managed.deleter = [](DLManagedTensor* self) { delete static_cast<Kept*>(self->manager_ctx); };
  void* object = nullptr;
  if (runtime().tensor(&kept->managed, alignment, 1, &object)) {
    delete kept;
    throw Refused(raised_error());
  }
  return Handle(object, kTVMFFITensor);
}

// A copy of a tensor that the code returned.
inline Array copied(const Handle& result) {
  if (result.value().type_index != kTVMFFITensor) throw Refused("the code returned something that is no tensor");
  const DLTensor& given = *TVMFFITensorGetDLTensorPtr(result.value().v_ptr);
  std::string dtype;
  for (const char* name : {"float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8",
                           "uint16", "uint32", "uint64", "bool"}) {
    const Dtype& row = dtype_named(name);
    if (row.code == given.dtype.code && row.bits == given.dtype.bits) dtype = name;
  }
  if (dtype.empty() && given.dtype.code == kDLUInt && given.dtype.bits == 1) dtype = "bool";
  Array array(dtype, std::vector<int64_t>(given.shape, given.shape + given.ndim));
  std::memcpy(array.data.get(), static_cast<const char*>(given.data) + given.byte_offset, array.bytes());
  return array;
}

}  // namespace graphopt

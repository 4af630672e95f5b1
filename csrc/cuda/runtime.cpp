#include "cuda/runtime.h"

#include <dlfcn.h>

#include <array>
#include <memory>
#include <stdexcept>

namespace mlxsae::cuda {

namespace {

/** A library that is loaded already; nothing is ever loaded here. */
void* loaded(const char* name) {
  void* handle = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
  if (!handle) throw std::runtime_error(std::string("[cuda] MLX must have loaded ") + name + " but has not.");
  return handle;
}

template <class F>
void find(F*& function, void* library, const char* name) {
  function = reinterpret_cast<F*>(dlsym(library, name));
  if (!function)
    throw std::runtime_error(std::string("[cuda] there must be a function ") + name + " but there is none.");
}

// Results and handles as in the C interfaces of NVRTC and of the driver.
using Status = int;
using Program = struct _nvrtcProgram*;
using Module = struct CUmod_st*;

struct Compiler {
  Status (*create)(Program*, const char*, const char*, int, const char* const*, const char* const*);
  Status (*compile)(Program, int, const char* const*);
  Status (*log_size)(Program, size_t*);
  Status (*log)(Program, char*);
  Status (*code_size)(Program, size_t*);
  Status (*code)(Program, char*);
  Status (*destroy)(Program*);
  const char* (*message)(Status);

  Compiler() {
    void* lib = loaded("libnvrtc.so.13");
    find(create, lib, "nvrtcCreateProgram");
    find(compile, lib, "nvrtcCompileProgram");
    find(log_size, lib, "nvrtcGetProgramLogSize");
    find(log, lib, "nvrtcGetProgramLog");
    find(code_size, lib, "nvrtcGetCUBINSize");
    find(code, lib, "nvrtcGetCUBIN");
    find(destroy, lib, "nvrtcDestroyProgram");
    find(message, lib, "nvrtcGetErrorString");
  }
  void check(Status s) const {
    if (s != 0) throw std::runtime_error(std::string("[cuda] NVRTC: ") + message(s) + ".");
  }
};

struct Driver {
  Status (*init)(unsigned);
  Status (*device)(int*, int);
  Status (*attribute)(int*, int, int);
  Status (*load)(Module*, const void*);
  Status (*function)(Function*, Module, const char*);
  Status (*function_attribute)(int*, int, Function);
  Status (*message)(Status, const char**);

  Driver() {
    void* lib = loaded("libcuda.so.1");
    find(init, lib, "cuInit");
    find(device, lib, "cuDeviceGet");
    find(attribute, lib, "cuDeviceGetAttribute");
    find(load, lib, "cuModuleLoadData");
    find(function, lib, "cuModuleGetFunction");
    find(function_attribute, lib, "cuFuncGetAttribute");
    find(message, lib, "cuGetErrorString");
    check(init(0));
  }
  void check(Status s) const {
    if (s == 0) return;
    const char* text = nullptr;
    message(s, &text);
    throw std::runtime_error(std::string("[cuda] driver: ") + (text ? text : "unknown error") + ".");
  }
};

const Compiler& compiler() {
  static const Compiler c;
  return c;
}

const Driver& driver() {
  static const Driver d;
  return d;
}

// Of the driver's enumerations.
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76, kMaxThreadsPerBlock = 0;

}  // namespace

const MLX& mlx_cuda() {
  static const MLX table = [] {
    void* lib = loaded("libmlx.so");
    MLX m;
    find(m.get_command_encoder, lib, "_ZN3mlx4core2cu19get_command_encoderENS0_6StreamE");
    find(m.set_input_array, lib, "_ZN3mlx4core2cu14CommandEncoder15set_input_arrayERKNS0_5arrayE");
    find(m.set_output_array, lib, "_ZN3mlx4core2cu14CommandEncoder16set_output_arrayERKNS0_5arrayE");
    find(m.add_kernel_node, lib, "_ZN3mlx4core2cu14CommandEncoder19add_kernel_node_rawEP9CUfunc_st4dim3S5_S5_jPPv");
    find(m.add_completed_handler, lib, "_ZN3mlx4core2cu14CommandEncoder21add_completed_handlerESt8functionIFvvEE");
    return m;
  }();
  return table;
}

int capability(int device) {
  auto& d = driver();
  int handle = 0, major = 0, minor = 0;
  d.check(d.device(&handle, device));
  d.check(d.attribute(&major, kCapabilityMajor, handle));
  d.check(d.attribute(&minor, kCapabilityMinor, handle));
  return 10 * major + minor;
}

std::string compile(const std::string& text, const std::string& kernel, const std::string& architecture) {
  auto& c = compiler();
  Program p = nullptr;
  c.check(c.create(&p, text.c_str(), (kernel + ".cu").c_str(), 0, nullptr, nullptr));
  std::unique_ptr<Program, void (*)(Program*)> guard(&p, [](Program* q) { compiler().destroy(q); });
  std::string target = "--gpu-architecture=" + architecture, chosen = "-DMSL_KERNEL_" + kernel;
  std::array<const char*, 3> options{target.c_str(), chosen.c_str(), "-std=c++17"};
  if (c.compile(p, options.size(), options.data()) != 0) {
    size_t size = 0;
    c.check(c.log_size(p, &size));
    std::string log(size, '\0');
    c.check(c.log(p, log.data()));
    throw std::runtime_error("[cuda] " + kernel + " must compile for " + architecture + " but does not: " + log);
  }
  size_t size = 0;
  c.check(c.code_size(p, &size));
  std::string code(size, '\0');
  c.check(c.code(p, code.data()));
  return code;
}

Function load(const std::string& code, const std::string& kernel) {
  auto& d = driver();
  Module module = nullptr;
  Function f = nullptr;
  d.check(d.load(&module, code.data()));
  d.check(d.function(&f, module, kernel.c_str()));
  return f;
}

int most_threads(Function f) {
  auto& d = driver();
  int threads = 0;
  d.check(d.function_attribute(&threads, kMaxThreadsPerBlock, f));
  return threads;
}

}  // namespace mlxsae::cuda

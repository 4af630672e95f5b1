// From a launch of the machine to a kernel of the CUDA text, and what Python must know of its buffers. Included between
// msl.cuh and the kernels. The layouts are those of runtime/launch.h.
namespace cuda_on_cpu {

struct Described {
  char scalar;
  int scalar_bytes, bytes, constant;
};
struct Kernel {
  const char* name;
  void (*run)();
  int parameters;
  const Described* described;
};

template <class P>
constexpr Described describe() {
  using Referred = std::remove_pointer_t<std::remove_reference_t<P>>;
  using T = std::remove_cv_t<Referred>;
  constexpr bool constant = std::is_const_v<Referred>;
  char c = 'V';
  if constexpr (std::is_same_v<T, bool>)
    c = '?';
  else if constexpr (std::is_same_v<T, metal::bfloat>)
    c = 'b';
  else if constexpr (std::is_same_v<T, metal::half> || std::is_same_v<T, float>)
    c = 'f';
  else if constexpr (std::is_same_v<T, metal::atomic_int>)
    c = 'i';
  else if constexpr (std::is_same_v<T, metal::atomic_uint>)
    c = 'u';
  else if constexpr (std::is_integral_v<T>)
    c = std::is_signed_v<T> ? 'i' : 'u';
  return {c, c == 'V' ? 1 : int(sizeof(T)), int(sizeof(T)), constant};
}
template <class... P>
struct Description {
  static constexpr Described list[] = {describe<P>()...};
};
template <class... P>
constexpr const Described* describe_all(void (*)(P...)) {
  return Description<P...>::list;
}

template <class P>
P argument(int index) {
  void* memory = msl_launch_state()->buffers[index].data;
  if constexpr (std::is_reference_v<P>)
    return *static_cast<std::remove_reference_t<P>*>(memory);
  else
    return P{memory};
}
template <class... P, size_t... I>
void call(void (*kernel)(P...), const int* indices, std::index_sequence<I...>) {
  kernel(argument<P>(indices[I])...);
}
template <class... P>
void call(void (*kernel)(P...), const int* indices) {
  call(kernel, indices, std::index_sequence_for<P...>());
}

}  // namespace cuda_on_cpu

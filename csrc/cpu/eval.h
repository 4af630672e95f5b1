#pragma once
// What every eval_cpu shares.

#include <cstring>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/common.h"

namespace mlxsae::cpu {

inline Type type_of(const mx::array& a) {
  return a.dtype() == mx::float32 ? Type::f32 : a.dtype() == mx::float16 ? Type::f16 : Type::bf16;
}
inline ShadowType shadow_type_of(const mx::array& w16) {
  auto type = w16.dtype();
  return type == mx::int8 ? ShadowType::i8 : type == mx::int16 ? ShadowType::i16 : ShadowType::bf16;
}
inline Rows rows_of(const mx::array& a) { return {a.data<char>(), type_of(a), a.shape(0), a.shape(1)}; }
inline Code code_of(const mx::array* values, const mx::array& indices, const mx::array* offsets) {
  return {values ? values->data<char>() : nullptr,
          values ? type_of(*values) : Type::f32,
          indices.data<uint32_t>(),
          offsets ? offsets->data<int64_t>() : nullptr,
          offsets ? offsets->shape(0) - 1 : indices.shape(0),
          offsets ? 0 : indices.shape(1),
          static_cast<int64_t>(indices.size())};
}

/** Memory for an output; large ones ask for large pages, which the walks over weights gain from. */
void allocate(mx::array& out);

/**
 * Moves what already fills the memory of a large array to large pages, once for each array: for weights and moments
 * that are updated in place wherever they were made. Where the system does not, nothing is lost.
 */
void settle(const void* data, size_t bytes);

/** An output that begins as a copy of an input: in its memory where nobody else holds it. */
class InPlace {
 public:
  InPlace(const mx::array& in, mx::array& out) : donated_(in.is_donatable()) {
    if (donated_)
      out.copy_shared_buffer(in);
    else
      allocate(out);
    to_ = out.data<char>(), from_ = in.data<char>(), bytes_ = in.nbytes();
  }
  /** To be called by the task before it reads the output. */
  void begin() const {
    if (donated_)
      settle(to_, bytes_);
    else
      std::memcpy(to_, from_, bytes_);
  }

 private:
  bool donated_;
  char* to_;
  const char* from_;
  size_t bytes_;
};

/**
 * MLX counts a task as running before it hands it to the stream (CommandEncoder::dispatch, 0.32.4); if an earlier task
 * has thrown by then, the main thread throws that error in between, and the count stays one too high for ever. Over ten
 * of these and every evaluation waits for tasks that nobody has. So what our tasks lose is given back: the next
 * dispatch after `task_failed` waits for the stream, and takes what is still counted then for lost, one a failure at
 * most. Throws the error of an earlier asynchronous evaluation, if one is pending, as MLX would.
 */
void task_failed();
void give_back_lost_tasks(mx::Stream s);

/**
 * Runs `task` on the stream's thread. It must hold pointers and sizes by value, never arrays: MLX keeps the buffers of
 * inputs and outputs until the task is done.
 */
template <class Task>
void dispatch(mx::Stream s, const Arrays& inputs, Arrays& outputs, Task task) {
  give_back_lost_tasks(s);
  auto& encoder = mx::cpu::get_command_encoder(s);
  for (auto& a : inputs) encoder.set_input_array(a);
  for (auto& a : outputs) encoder.set_output_array(a);
  encoder.dispatch([task = std::move(task)]() mutable {
    try {
      Computing computing;
      task();
    } catch (...) {
      task_failed();
      throw;
    }
  });
}

/** Where share i of n tokens begins, of `shares` that consist of whole panels of the encode kernel. */
inline int64_t share_of_tokens(int64_t n, int64_t i, int64_t shares) {
  int64_t panel = kernels().token_block / 2, panels = (n + panel - 1) / panel;
  return std::min(n, panel * (panels * i / shares));
}

/** parallel_for over [0, n) in ranges: several for each thread, of at least `least` items. */
void parallel_ranges(int64_t n, int64_t least, const std::function<void(int64_t begin, int64_t end)>& task);

/** Throws std::out_of_range unless the rows lie within the code, one after the other, and every index is below d_sae.
 */
void check_code(const char* op, const Code& code, int64_t d_sae);

/** The entries of a code, counted and sorted by feature (a counting sort: stable, so rows ascend in each feature). */
class Grouped {
 public:
  /** Of all entries, or of those that are not <= 0. */
  Grouped(const Code& code, int64_t d_sae, bool positive = false);
  ByFeature view() const { return {starts_.data(), rows_.get(), values_.get()}; }
  /** Ranges of features that cost about the same: entries plus `per_feature` each. */
  std::vector<int64_t> ranges(int64_t parts, double per_feature) const;

 private:
  std::vector<int64_t> starts_;
  std::unique_ptr<uint32_t[]> rows_;
  std::unique_ptr<float[]> values_;
};

}  // namespace mlxsae::cpu

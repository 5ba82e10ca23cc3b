// The operator. Computes log K of all pairs or of given pairs or, given `grad`, the gradients to both sides and log c.
#include <ATen/Context.h>
#include <torch/library.h>

#include "pairs.h"

namespace unigd {
namespace {

// 0 is the baseline, 1 is AVX2 and 2 is AVX-512.
int64_t best_instruction_set() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

template <typename T> LaneKernels<T> kernels_for(int64_t instruction_set) {
#if defined(__x86_64__)
  if (instruction_set == 2) return avx512::kernels<T>();
  if (instruction_set == 1) return avx2::kernels<T>();
#endif
  return baseline::kernels<T>();
}

ColumnRanges read_ranges(at::IntArrayRef flat, bool modalities) {
  ColumnRanges ranges;
  ranges.single = !modalities;
  for (size_t k = 0; k < flat.size(); k += 4) {
    const std::pair<int64_t, int64_t> range(flat[k + 2], flat[k + 3]);
    size_t s = std::find(ranges.bounds.begin(), ranges.bounds.end(), range) - ranges.bounds.begin();
    if (s == ranges.bounds.size()) {
      ranges.bounds.push_back(range);
      ranges.compared.emplace_back();
    }
    if (modalities) ranges.compared[s][flat[k]][flat[k + 1]] = true;
  }
  return ranges;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, double> align(
    const at::Tensor& x, const at::Tensor& x_offsets, const std::optional<at::Tensor>& x_modalities,
    const std::optional<at::Tensor>& y, const std::optional<at::Tensor>& y_offsets,
    const std::optional<at::Tensor>& y_modalities, const std::optional<at::Tensor>& pairs,
    const std::optional<at::Tensor>& grad, at::IntArrayRef modality_columns, double scale, bool per_pair, bool gaussian,
    bool bfloat16, double linear_limit, int64_t instruction_set) {
  at::NoGradGuard no_grad;
  const ColumnRanges ranges = read_ranges(modality_columns, x_modalities.has_value());
  const int64_t isa = instruction_set < 0 ? best_instruction_set() : std::min(instruction_set, best_instruction_set());
  // Products of bfloat16 take two consecutive features at a time, so every range must start and stop at an even column.
  bfloat16 = bfloat16 && !pairs && isa == 2 && x.scalar_type() == at::kFloat && x.size(1) % 2 == 0 && has_bfloat16_products();
  for (const auto& [start, stop] : ranges.bounds) bfloat16 = bfloat16 && start % 2 == 0 && stop % 2 == 0;
  const bool one_thread = at::globalContext().deterministicAlgorithms();
  at::Tensor log_k, dx, dy;
  double by_log_scale = 0;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "alignment", [&] {
    const Side<scalar_t> first(x, x_offsets, x_modalities, ranges, bfloat16);
    std::optional<Side<scalar_t>> second;
    if (y) second.emplace(*y, *y_offsets, y_modalities, ranges, bfloat16);
    const Side<scalar_t>& other = y ? *second : first;
    Gradients<scalar_t> gradients{};
    if (grad) {
      dx = at::zeros_like(x);
      dy = y ? at::zeros_like(*y) : dx;
      gradients.dx = dx.mutable_data_ptr<scalar_t>();
      gradients.dy = dy.mutable_data_ptr<scalar_t>();
    } else {
      log_k = pairs ? at::empty({pairs->size(0)}, x.options()) : at::empty({first.count, other.count}, x.options());
    }
    scalar_t* out = grad ? nullptr : log_k.mutable_data_ptr<scalar_t>();
    const scalar_t* weights = grad ? grad->const_data_ptr<scalar_t>() : nullptr;
    const LaneKernels<scalar_t> kernels = kernels_for<scalar_t>(isa);
    const Settings settings{gaussian, linear_limit};
    if (pairs)
      Pairs<scalar_t>(first, other, pairs->const_data_ptr<int64_t>(), pairs->size(0), ranges, {scale, per_pair},
                      kernels, settings, out, weights)
          .run(&gradients, one_thread);
    else
      Gram<scalar_t>(first, other, !y, ranges, {scale, per_pair}, kernels, settings, isa == 2 && has_block_products(),
                     out, weights)
          .run(&gradients, one_thread);
    by_log_scale = gradients.by_log_scale;
  });
  auto or_empty = [&](const at::Tensor& t) { return t.defined() ? t : at::empty({0}, x.options()); };
  return {or_empty(log_k), or_empty(dx), y ? or_empty(dy) : at::empty({0}, x.options()), by_log_scale};
}

}  // namespace

// TORCH_LIBRARY of torch 2.10 does not expand the name that it is given, so a macro of ours does.
#define TORCH_LIBRARY_OF_NAME(name, module) TORCH_LIBRARY(name, module)

TORCH_LIBRARY_OF_NAME(TORCH_EXTENSION_NAME, m) {
  m.def(
      "align(Tensor x, Tensor x_offsets, Tensor? x_modalities, Tensor? y, Tensor? y_offsets, Tensor? y_modalities, "
      "Tensor? pairs, Tensor? grad, int[] modality_columns, float scale, bool per_pair, bool gaussian, "
      "bool bfloat16, float linear_limit, int instruction_set) -> (Tensor, Tensor, Tensor, float)",
      &align);
}

}  // namespace unigd

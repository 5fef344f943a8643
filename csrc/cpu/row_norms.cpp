// SPDX-License-Identifier: Apache-2.0
//
// The norms of sparse gradients: plan of the rows, then a pass over the sums of repeated rows and
// one over all other entries. Nothing but a few numbers is kept. What a task adds up depends on the
// entries alone, and tasks are added in order: the result has the same bits whatever the number of
// threads.
#include <ATen/Functions.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <vector>

#include "cpu/float_mode.h"
#include "cpu/long_runs.h"
#include "cpu/parallel.h"
#include "cpu/row_plan.h"
#include "step/checks.h"
#include "step/row_norms.h"

namespace tiger_ext {
namespace {

constexpr int64_t kElementsPerTask = 65536;
constexpr int64_t kMaxEntriesPerTask = 4096;

// The items of sparse gradients, and what they point to.
class Gradients {
 public:
  explicit Gradients(const std::vector<at::Tensor>& grads) {
    sizes_.reserve(grads.size());
    for (size_t k = 0; k < grads.size(); ++k) add(grads[k], static_cast<int>(k));
  }

  const std::vector<RowsItem>& items() const { return items_; }
  const std::vector<RowIndices>& indices() const { return indices_; }
  // Where the gradient of items()[k] stands in the list.
  int place(size_t k) const { return places_[k]; }

 private:
  void add(const at::Tensor& grad, int place) {
    Update u;  // what the checks name
    u.position = place;
    if (grad.layout() != at::kSparse || !grad.is_cpu() || !is_plain(grad))
      refuse(u, "the gradient has layout ", grad.layout(), " on ", grad.device(), ", expected ",
             at::kSparse, " on the CPU");
    const auto* impl = static_cast<const at::SparseTensorImpl*>(grad.unsafeGetTensorImpl());
    at::Tensor values = impl->values().resolve_neg();
    const at::Tensor indices = impl->indices().to(at::kLong);
    const int64_t sparse_dim = grad.sparse_dim();
    if (indices.size(0) != sparse_dim || indices.size(1) != values.size(0) ||
        values.sizes().slice(1) != grad.sizes().slice(sparse_dim))
      refuse(u, "the gradient of shape ", grad.sizes(), " has indices of shape ", indices.sizes(),
             " and values of shape ", values.sizes());
    if (!holds_its_elements(values) || !holds_its_elements(indices))
      refuse(u, "the gradient's memory is smaller than its indices or values");
    if (indices.size(1) == 0) return;

    RowsItem item;
    sizes_.push_back(grad.sizes().vec());
    item.rows = item.dim = 1;
    for (int64_t d = 0; d < sparse_dim; ++d) item.rows *= grad.size(d);
    for (int64_t d = sparse_dim; d < grad.dim(); ++d) item.dim *= grad.size(d);
    item.entries = indices.size(1);
    if (!items_.empty()) {
      item.first_row = items_.back().first_row + items_.back().rows + 1;
      item.first_entry = items_.back().first_entry + items_.back().entries;
    }
    if (!values.select(0, 0).is_contiguous()) values = values.contiguous();
    item.values = {const_cast<void*>(values.const_data_ptr()),
                   storage_of(u, values, "the gradient")};
    item.value_stride = values.stride(0);
    item.param.storage =  // the arithmetic type
        values.scalar_type() == at::kDouble ? Storage::kFloat64 : Storage::kFloat32;
    items_.push_back(item);
    indices_.push_back({indices.const_data_ptr<int64_t>(), indices.stride(0), indices.stride(1),
                        sparse_dim, sizes_.back().data(), grad.is_coalesced()});
    places_.push_back(place);
    kept_.push_back(indices);
    kept_.push_back(values);
  }

  std::vector<RowsItem> items_;
  std::vector<RowIndices> indices_;
  std::vector<int> places_;
  std::vector<std::vector<int64_t>> sizes_;
  std::vector<at::Tensor> kept_;
};

struct Task {
  const RowsItem* item;
  int64_t begin, end;  // of its entries
};

std::vector<Task> cut(const std::vector<RowsItem>& items) {
  std::vector<Task> tasks;
  for (const RowsItem& item : items) {
    const int64_t entries = std::clamp<int64_t>(kElementsPerTask / std::max<int64_t>(item.dim, 1),
                                                1, kMaxEntriesPerTask);
    for (int64_t begin = 0; begin < item.entries; begin += entries)
      tasks.push_back({&item, begin, std::min(begin + entries, item.entries)});
  }
  return tasks;
}

}  // namespace

at::Tensor row_norms(const std::vector<at::Tensor>& grads, double p) {
  const at::NoGradGuard no_grad;
  const FloatMode mode;
  const Gradients gradients(grads);
  const std::vector<RowsItem>& items = gradients.items();
  const at::Tensor result =
      at::zeros({static_cast<int64_t>(grads.size())}, at::TensorOptions(at::kDouble));
  if (items.empty()) return result;

  Scratch scratch;
  SortedEntries sorted;
  const BadIndex bad = plan_rows(items, gradients.indices(), scratch, sorted);
  if (bad.item >= 0) {
    const RowIndices& ix = gradients.indices()[bad.item];
    throw bad_index({0, gradients.place(bad.item)}, bad.entry,
                    ix.data[bad.dimension * ix.dim_stride + bad.entry * ix.entry_stride],
                    bad.dimension, ix.sizes[bad.dimension]);
  }
  LongRunSums long_runs;
  long_runs.prepare(items, sorted, scratch);
  long_runs.sum();

  const std::vector<Task> tasks = cut(items);
  const int64_t count = static_cast<int64_t>(tasks.size());
  const NormKind kind = norm_kind(p);
  const CpuKernels& kernels = cpu_kernels();
  std::vector<NormPart> parts(tasks.size());
  std::vector<uint8_t> repeated(items.back().first_entry + items.back().entries);
  for_each_task(count, [&](int64_t t) {
    const RowsItem& item = *tasks[t].item;
    parts[t] = kernels.repeated_rows_norm(item, sorted, long_runs.runs(),
                                          item.first_entry + tasks[t].begin,
                                          item.first_entry + tasks[t].end, p, repeated.data());
  });
  for_each_task(count, [&](int64_t t) {
    const RowsItem& item = *tasks[t].item;
    parts[t].add(kind, kernels.other_rows_norm(item, tasks[t].begin, tasks[t].end, p,
                                               repeated.data() + item.first_entry));
  });

  double* const norms = result.mutable_data_ptr<double>();
  for (size_t k = 0, t = 0; k < items.size(); ++k) {
    NormPart whole = NormPart::nothing(kind);
    for (; t < tasks.size() && tasks[t].item == &items[k]; ++t) whole.add(kind, parts[t]);
    norms[gradients.place(k)] = whole.norm(p, items[k].rows);
  }
  return result;
}

}  // namespace tiger_ext

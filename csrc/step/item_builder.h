// SPDX-License-Identifier: Apache-2.0
//
// Turns the checked tensors of one device's parameters into plain items, whatever their strides.
#pragma once

#include <ATen/core/Tensor.h>

#include <deque>
#include <utility>
#include <vector>

#include "step/items.h"
#include "step/step.h"

namespace tiger_ext {

// Whether the momentum's blocks in memory are those of the parameter.
bool has_block_order(const Update& u);

class ItemBuilder {
 public:
  // A learning rate in device memory (a float64 element) or null, and likewise AdamW's counter.
  void add(const Update& u, const double* lr = nullptr, int64_t* step = nullptr);

  // A table whose rows are only to catch up: a direct item without values.
  void add_table(const Update& u);

  // Before the items are updated: what closes an accumulation window follows another update, a
  // strided gradient may follow the catch-up of rows that lag behind, and state may have been
  // filled since that an option or other rows store anew.
  void start() const;

  // After the items were updated: writes copies back to tensors whose memory could not be updated
  // in place, and tells autograd what was written.
  void finish() const;

  std::vector<DenseItem>& dense() { return dense_; }
  std::vector<RowsItem>& rows() { return rows_; }
  std::vector<RowsItem>& direct() { return direct_; }
  const std::vector<RowIndices>& indices() const { return indices_; }
  // The rules of updates that touch no element: only their counters advance.
  const std::vector<RuleUse>& idle() const { return idle_; }
  // Where the parameter of dense()[k], rows()[k], direct()[k] stands in the optimizer.
  const std::vector<UpdatePlace>& dense_places() const { return dense_places_; }
  const std::vector<UpdatePlace>& row_places() const { return row_places_; }
  const std::vector<UpdatePlace>& direct_places() const { return direct_places_; }

 private:
  Stream writable(const Update& u, const at::Tensor& t, const at::Tensor& order, Storage storage);
  static Rounding rounding_of(const Update& u);
  void add_dense(const Update& u, RuleUse rule);
  void add_rows(const Update& u, RuleUse rule);
  void add_direct(const Update& u, RuleUse rule);
  RowsItem rows_item(const Update& u, RuleUse rule, int64_t sparse_dim);
  const RuleParams* shared_rule(const RuleParams& rule);
  RowLayout row_layout(const at::Tensor& t, int64_t sparse_dim);
  const int64_t* inner_offsets(const at::Tensor& t, int64_t sparse_dim, int64_t count);
  const int64_t* numbers(at::IntArrayRef from);

  std::vector<DenseItem> dense_;
  std::vector<RowsItem> rows_, direct_;
  std::vector<RowIndices> indices_;
  std::vector<RuleUse> idle_;
  std::vector<UpdatePlace> dense_places_, row_places_, direct_places_;
  std::deque<RuleParams> rules_;
  std::deque<std::vector<int64_t>> numbers_;  // what the layouts point to
  std::vector<at::Tensor> kept_;              // inputs that must outlive the step
  std::vector<at::Tensor> written_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copy_back_, late_copies_;
};

}  // namespace tiger_ext

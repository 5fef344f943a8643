// SPDX-License-Identifier: Apache-2.0
//
// The plain items of a step's two work lists, on any device: pointers, strides and storage types,
// no torch. item_builder.cpp makes them from tensors.
#pragma once

#include <cstdint>

#include "rules/rounding.h"
#include "rules/storage.h"
#include "rules/update_rules.h"

namespace tiger_ext {

// A run of a row's entries is summed in pieces of this many, each left to right, then the pieces'
// sums left to right. The order depends on nothing else, so neither does any bit of the result.
constexpr int64_t kPiece = 256;

struct Stream {
  void* data = nullptr;
  Storage storage = Storage::kFloat32;
};

// The keys of one parameter's stochastic rounding, once the number of its step is known.
struct Rounding {
  bool momentum = false;  // stored in int8
  bool param = false;
  uint64_t seed = 0;
  int64_t position = 0;
  const int64_t* steps = nullptr;  // that the parameter has taken; null: it only catches up
  uint64_t momentum_key = 0, param_key = 0, caught_up_key = 0;

  // `current`: the step up to which a row is brought that only catches up.
  void begin(int64_t current) {
    const int64_t step = steps ? *steps + 1 : 0;
    param_key = rounding_key(seed, RoundedStream::kParam, step, position);
    momentum_key = rounding_key(seed, RoundedStream::kMomentum, step, position);
    caught_up_key = rounding_key(seed, RoundedStream::kParamCaughtUp, current, position);
  }
};

// How an item is updated: the constants, and what of them only the device knows.
struct RuleUse {
  const RuleParams* params = nullptr;
  const double* lr = nullptr;  // if set: the learning rate, in the item's device memory
  int64_t* step = nullptr;     // if set: AdamW's counter, in the item's device memory
  // If set: the accumulation window that the tensor, or each row, was last part of, contiguous.
  int32_t* window = nullptr;
  // If set, in a lazy mode: the clock of the tensor (last_steps == 1) or of each of its rows.
  int32_t* last_step = nullptr;
  int64_t last_steps = 0;
  Rounding rounding;
};

// One parameter with a strided gradient. All streams share one element order.
struct DenseItem {
  RuleUse rule;
  Stream param;
  Stream grad;
  Stream states[kMaxStates];
  float* scales = nullptr;  // of states[0] in int8: one for each kRoundingBlock elements
  int64_t numel = 0;

  // Whether its blocks must not be cut.
  bool has_blocks() const { return rule.rounding.momentum || rule.rounding.param; }
};

// Where the vector of row r lies, in elements from the start of the tensor, and its element c.
struct RowLayout {
  int64_t row_stride = 0;  // offset = r * row_stride, when dims == 0
  int64_t dims = 0;        // else r is unravelled over sizes[dims]
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t inner_dims = 0;  // 0: contiguous; else c is unravelled over inner_sizes[inner_dims]
  const int64_t* inner_sizes = nullptr;
  const int64_t* inner_strides = nullptr;
  const int64_t* inner = nullptr;  // the offset of each c, in host memory; null: contiguous

  int64_t offset(int64_t row) const {
    if (dims == 0) return row * row_stride;
    int64_t result = 0;
    for (int64_t d = dims; d-- > 0;) {
      result += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return result;
  }
};

// One parameter that is updated by rows. Either its rows come as a list of entries, sorted by the
// row plan, or (`direct`) the gradient is strided and its rows are looked at one by one: entry r is
// row r, and first_row and first_entry mean nothing. Without `values` the gradient is zero.
//
// Its entries are the global entries
// [first_entry, first_entry + entries), its rows the global rows [first_row, first_row + rows].
// The last of these does not exist: entries with a bad index are sorted there on a GPU.
struct RowsItem {
  RuleUse rule;
  Stream param;
  Stream states[kMaxStates];
  Stream values;  // entry e starts at e * value_stride, contiguous from there
  RowLayout param_layout;
  RowLayout state_layouts[kMaxStates];
  float* scales = nullptr;   // of states[0] in int8: one a row
  int64_t block_scales = 0;  // how many there are, if instead one for each kRoundingBlock elements
  void* row_moment = nullptr;  // of a rule that has one, in the arithmetic type: one number a row
  int64_t value_stride = 0;
  int64_t dim = 0;
  int64_t rows = 0;
  int64_t entries = 0;
  int64_t first_row = 0;
  int64_t first_entry = 0;
  bool direct = false;
  const uint8_t* mask = nullptr;  // of a direct item: the touched rows, for Touched::kMasked
};

// The indices of one sparse gradient: index d of entry e is data[d * dim_stride + e *
// entry_stride].
struct RowIndices {
  const int64_t* data = nullptr;
  int64_t dim_stride = 0;
  int64_t entry_stride = 0;
  int64_t sparse_dim = 0;
  const int64_t* sizes = nullptr;  // of the parameter's first sparse_dim dimensions
  bool coalesced = false;          // said to be sorted and free of duplicates
};

}  // namespace tiger_ext

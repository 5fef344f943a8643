// SPDX-License-Identifier: Apache-2.0
//
// Keys are packed as (global row << position_bits | global position) and sorted by a stable radix
// sort over the bits that the rows need, least significant digit first, in parallel slices. The
// position takes part only by standing in order from the start.
#include "cpu/row_plan.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/parallel.h"

namespace tiger_ext {
namespace {

constexpr int kMaxDigitBits = 11;
constexpr int64_t kEntriesPerSlice = 8192;  // below this a further thread costs more than it saves

int bit_width(uint64_t x) { return x == 0 ? 0 : 64 - __builtin_clzll(x); }

struct Packed {
  bool in_range = true;
  bool sorted = true;
};

// Packs entries [begin, end) of one item. A bad index only clears `in_range`: which one it was is
// found afterwards, off the fast path.
Packed pack(const RowsItem& item, const RowIndices& ix, int position_bits, int64_t begin,
            int64_t end, uint64_t* keys) {
  uint64_t bad = 0, unsorted = 0, previous = 0;
  const uint64_t first_row = static_cast<uint64_t>(item.first_row);
  const uint64_t first_position = static_cast<uint64_t>(item.first_entry);
  if (ix.sparse_dim == 1 && ix.entry_stride == 1) {
    const uint64_t rows = static_cast<uint64_t>(item.rows);
    for (int64_t e = begin; e < end; ++e) {
      const uint64_t row = static_cast<uint64_t>(ix.data[e]);
      bad |= row >= rows;
      unsorted |= row < previous;
      previous = row;
      keys[item.first_entry + e] =
          (first_row + row) << position_bits | (first_position + static_cast<uint64_t>(e));
    }
  } else {
    for (int64_t e = begin; e < end; ++e) {
      uint64_t row = 0;
      for (int64_t d = 0; d < ix.sparse_dim; ++d) {
        const uint64_t size = static_cast<uint64_t>(ix.sizes[d]);
        const uint64_t index =
            static_cast<uint64_t>(ix.data[d * ix.dim_stride + e * ix.entry_stride]);
        bad |= index >= size;
        row = row * size + index;
      }
      unsorted |= row < previous;
      previous = row;
      keys[item.first_entry + e] =
          (first_row + row) << position_bits | (first_position + static_cast<uint64_t>(e));
    }
  }
  return {bad == 0, unsorted == 0};
}

BadIndex first_bad_index(const std::vector<RowsItem>& items,
                         const std::vector<RowIndices>& indices) {
  for (size_t k = 0; k < items.size(); ++k)
    for (int64_t e = 0; e < items[k].entries; ++e)
      for (int64_t d = 0; d < indices[k].sparse_dim; ++d) {
        const int64_t index =
            indices[k].data[d * indices[k].dim_stride + e * indices[k].entry_stride];
        if (index < 0 || index >= indices[k].sizes[d]) return {static_cast<int64_t>(k), e, d};
      }
  throw std::logic_error("tiger_ext: the indices of a gradient changed while it was read");
}

// One stable pass by the digit at `shift`. Every slice counts, the counts become places, every
// slice scatters to its own.
void radix_pass(const uint64_t* from, uint64_t* to, int64_t n, int shift, int digit_bits,
                int64_t slices, int64_t* counts) {
  const int64_t buckets = int64_t{1} << digit_bits;
  const uint64_t mask = static_cast<uint64_t>(buckets - 1);
  for_each_task(slices, [&](int64_t s) {
    int64_t* const count = counts + s * buckets;
    std::fill(count, count + buckets, 0);
    for (int64_t i = n * s / slices, end = n * (s + 1) / slices; i < end; ++i)
      ++count[from[i] >> shift & mask];
  });
  int64_t place = 0;
  for (int64_t b = 0; b < buckets; ++b)
    for (int64_t s = 0; s < slices; ++s) {
      const int64_t count = counts[s * buckets + b];
      counts[s * buckets + b] = place;
      place += count;
    }
  for_each_task(slices, [&](int64_t s) {
    int64_t* const places = counts + s * buckets;
    for (int64_t i = n * s / slices, end = n * (s + 1) / slices; i < end; ++i) {
      const uint64_t key = from[i];
      to[places[key >> shift & mask]++] = key;
    }
  });
}

}  // namespace

BadIndex plan_rows(const std::vector<RowsItem>& items, const std::vector<RowIndices>& indices,
                   Scratch& scratch, SortedEntries& sorted) {
  const RowsItem& last = items.back();
  const int64_t n = last.first_entry + last.entries;
  const int64_t rows = last.first_row + last.rows + 1;
  const int position_bits = bit_width(static_cast<uint64_t>(n - 1));
  const int row_bits = bit_width(static_cast<uint64_t>(rows - 1));
  if (position_bits + row_bits > 64)
    throw std::length_error("tiger_ext: " + std::to_string(n) + " gradient entries over " +
                            std::to_string(rows) + " rows do not fit 64-bit sort keys");

  uint64_t* keys = scratch.get<uint64_t>(Scratch::kKeys, n);
  const int64_t slices = std::clamp<int64_t>(n / kEntriesPerSlice, 1, thread_count());
  std::vector<Packed> packed(slices);
  for_each_task(slices, [&](int64_t s) {
    const int64_t begin = n * s / slices, end = n * (s + 1) / slices;
    size_t k = 0;
    while (items[k].first_entry + items[k].entries <= begin) ++k;
    for (; k < items.size() && items[k].first_entry < end; ++k) {
      const int64_t first = items[k].first_entry;
      const Packed p = pack(items[k], indices[k], position_bits, std::max(begin, first) - first,
                            std::min(end, first + items[k].entries) - first, keys);
      packed[s].in_range = packed[s].in_range && p.in_range;
      packed[s].sorted = packed[s].sorted && p.sorted;
    }
  });
  bool in_range = true, in_order = true;
  for (int64_t s = 0; s < slices; ++s) {
    in_range = in_range && packed[s].in_range;
    in_order = in_order && packed[s].sorted;
    const int64_t begin = n * s / slices;
    if (s > 0) in_order = in_order && keys[begin - 1] < keys[begin];
  }
  if (!in_range) return first_bad_index(items, indices);

  if (!in_order) {
    const int passes = (row_bits + kMaxDigitBits - 1) / kMaxDigitBits;
    uint64_t* other = scratch.get<uint64_t>(Scratch::kOtherKeys, n);
    int64_t* counts = scratch.get<int64_t>(Scratch::kCounts, slices << kMaxDigitBits);
    for (int pass = 0, done = 0; pass < passes; ++pass) {
      const int digit_bits = (row_bits - done + passes - pass - 1) / (passes - pass);
      radix_pass(keys, other, n, position_bits + done, digit_bits, slices, counts);
      std::swap(keys, other);
      done += digit_bits;
    }
  }
  sorted = {keys, position_bits};
  return {};
}

}  // namespace tiger_ext

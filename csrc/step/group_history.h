// SPDX-License-Identifier: Apache-2.0
//
// The history (history.h) of a parameter group's steps, wherever the kernels that read it run. For
// the CPU's it is here; a device has a copy in its own memory, which its kernels advance and of
// which the host knows only as much as it can without waiting.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "rules/history.h"
#include "step/faults.h"

namespace tiger_ext {

// The hyperparameters in force from step `first` on.
struct HistorySetting {
  int64_t first = 0;
  double lr = 0.0, weight_decay = 0.0, beta1 = 0.0, beta2 = 0.0;
};

struct HistoryNumbers {
  int32_t steps = 0;
  std::vector<HistorySetting> settings;
};

// A history in the memory of a device.
class HistoryCopy {
 public:
  virtual ~HistoryCopy() = default;
  // Makes room for one more step, before anything is written; `many`: for those of a captured
  // graph's replays.
  virtual void reserve(bool many) = 0;
  // Tells a rule where it lies.
  virtual void use(RuleParams& rule) const = 0;
  // The steps taken: one int32 element of the device, not waited for.
  virtual at::Tensor steps() const = 0;
  // Drops the settings: every row is current.
  virtual void forget() = 0;
  // Waits for the device.
  virtual HistoryNumbers read() = 0;
};

using HistoryCopyFactory = std::unique_ptr<HistoryCopy> (*)(c10::Device device,
                                                            const HistoryNumbers& numbers,
                                                            bool many);

struct HistoryCopyRegistration {
  HistoryCopyRegistration(c10::DeviceType device, HistoryCopyFactory factory);
};

// Null where kernels read the host's memory.
HistoryCopyFactory history_copy_factory(c10::DeviceType device);

class GroupHistory {
 public:
  struct ByName {
    bool operator()(c10::Device a, c10::Device b) const {
      return a.type() != b.type() ? a.type() < b.type() : a.index() < b.index();
    }
  };
  using Copies = std::map<c10::Device, std::unique_ptr<HistoryCopy>, ByName>;

  // For kernels on the CPU: settings, in order, and up to which step rows are brought.
  void append(const HistorySetting& setting);
  void bring_to(int32_t steps);
  // Drops all settings, everywhere.
  void forget();

  // In all copies.
  void reserve(bool many);
  // Whether kernels find the history from there.
  bool has(c10::Device device) const;
  // Where they do: tells them by the rule.
  void use(RuleParams& rule, c10::Device device) const;
  // Of the kernels on the CPU: rows are brought up to an earlier step.
  static void use_until(RuleParams& rule, int32_t step);
  // Begins a copy for a device whose kernels need one; returns whether they do.
  bool place(c10::Device device, const HistoryNumbers& numbers, bool many);

  const Copies& copies() const { return copies_; }

  // What a rule points to. Whoever uses one without the GIL holds these, as other threads may
  // append and forget meanwhile.
  using Stretches = std::vector<Stretch>;
  std::shared_ptr<const Stretches> stretches() const { return stretches_; }
  // Held while kernels on the CPU write rows of the group: a thread that reads tracked rows may
  // bring them up to date while another one takes a step.
  std::mutex& rows() { return rows_; }

  // Whether anybody else has written to the group's parameter at `position` since `note`, as its
  // version counter tells; false for another parameter than was noted.
  bool rewritten(int64_t position, const at::Tensor& param) const;
  void note(int64_t position, const at::Tensor& param);

 private:
  struct Seen {
    const void* param = nullptr;
    int64_t version = 0;
  };

  std::shared_ptr<Stretches> stretches_ = std::make_shared<Stretches>();
  std::mutex rows_;
  std::vector<Seen> seen_;
  size_t known_ = 0;
  int32_t current_ = -1;
  uint32_t number_ = 0;
  Copies copies_;
};

}  // namespace tiger_ext

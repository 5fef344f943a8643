// SPDX-License-Identifier: Apache-2.0
//
// Where errors happen, and how a device tells of them. No torch; host and device.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

namespace tiger_ext {

// A parameter of an optimizer.
struct UpdatePlace {
  int group = 0;
  int position = 0;
};

enum class FaultKind : int {
  kIndexOutOfRange,
  kNotCoalesced,
  kHistoryFull,  // a step's hyperparameters were not noted; `rows` could be
  kRateTooLarge  // lr * weight_decay was at least 1 in a lazy mode
};
constexpr int kFaultKinds = 4;

// What a device's kernels found wrong while the host did not wait for them. They drop the entries
// concerned; the optimizer's next step throws.
struct FaultDetails {
  UpdatePlace place;
  int64_t entry = 0;
  int64_t index = 0;
  int64_t dimension = 0;
  int64_t rows = 0;
};

// The report of one kind, in memory that the host and one device see (cuda/faults.cuh writes it).
// The first report stays until the host has taken it; those after it are only counted. Every word
// has one writer, device or host, because the atomics of a device are none to the host.
struct FaultCell {
  uint32_t claimed;  // device: reports begun
  uint32_t ready;    // device: reports finished
  uint32_t taken;    // host: reports read
  uint32_t unused;
  unsigned long long entries;  // device: concerned, in all reports and those left out
  FaultDetails details;        // device
};

struct FaultSlot {
  FaultCell cells[kFaultKinds];
};

struct Fault {
  FaultKind kind;
  FaultDetails details;
  uint64_t entries;  // concerned since the last report
};

// An optimizer's faults: a slot for each device, made when the device needs it.
class Faults {
 public:
  using Make = std::shared_ptr<FaultSlot> (*)();

  // Not null. `device` is its index.
  FaultSlot* slot(int device, Make make);
  // A report that is complete, if there is one; not waited for.
  std::optional<Fault> take();
  // Throws UpdateError for it.
  void raise();

 private:
  struct Own {
    std::shared_ptr<FaultSlot> slot;
    std::array<uint64_t, kFaultKinds> told{};  // of `entries`
  };

  std::mutex mutex_;  // ops are called from several threads
  std::map<int, Own> slots_;
};

}  // namespace tiger_ext

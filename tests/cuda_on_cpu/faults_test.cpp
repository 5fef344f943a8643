// SPDX-License-Identifier: Apache-2.0
//
// How kernels report to the host, and who gets the memory for it: reports that arrive late,
// together or while the host reads.
#include <atomic>
#include <cstdio>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "../cpp/check.h"
#include "cuda/fault_memory.h"
#include "cuda/faults.cuh"

extern "C" void cuda_on_cpu_busy(int on);
extern "C" void cuda_on_cpu_capture(int on);
extern "C" int64_t cuda_on_cpu_events();

namespace tiger_ext {
namespace {

constexpr auto kIndex = FaultKind::kIndexOutOfRange, kRate = FaultKind::kRateTooLarge;

// All numbers are equal, so that a mixture of two shows.
FaultDetails details(int64_t number) {
  return {{static_cast<int>(number), static_cast<int>(number)}, number, number, number, number};
}

bool is(const FaultDetails& d, int64_t number) {
  return d.place.group == number && d.place.position == number && d.entry == number &&
         d.index == number && d.dimension == number && d.rows == number;
}

bool takes(Faults& faults, FaultKind kind, int64_t number, uint64_t entries) {
  const std::optional<Fault> f = faults.take();
  return f && f->kind == kind && is(f->details, number) && f->entries == entries;
}

void check_the_first_report_stays() {
  Faults faults;
  CHECK(!faults.take());
  FaultSlot* const slot = faults.slot(0, make_fault_memory);
  CHECK(slot == faults.slot(0, make_fault_memory));
  CHECK(!faults.take());
  report_fault(slot, kIndex, details(1), 3);
  report_fault(slot, kIndex, details(2), 4);
  CHECK(takes(faults, kIndex, 1, 7));
  CHECK(!faults.take());
  report_fault(slot, kIndex, details(3), 5);
  CHECK(takes(faults, kIndex, 3, 5));
  CHECK(!faults.take());
}

void check_kinds_do_not_displace_each_other() {
  Faults faults;
  FaultSlot* const slot = faults.slot(0, make_fault_memory);
  report_fault(slot, kRate, details(1), 1);
  report_fault(slot, kIndex, details(2), 1);
  CHECK(takes(faults, kIndex, 2, 1));
  CHECK(takes(faults, kRate, 1, 1));
  CHECK(!faults.take());
}

void check_half_a_report_is_not_read() {
  Faults faults;
  FaultSlot* const slot = faults.slot(0, make_fault_memory);
  FaultCell& cell = slot->cells[static_cast<int>(kIndex)];
  cell.entries += 2;
  uint32_t number = 0;
  CHECK(claim(cell, number));
  CHECK(!faults.take());
  report_fault(slot, kIndex, details(9), 1);  // of another stream
  CHECK(!faults.take());
  publish(cell, number, details(8));
  CHECK(takes(faults, kIndex, 8, 3));
  CHECK(!faults.take());
}

void check_entries_are_told_once() {
  Faults faults;
  FaultSlot* const slot = faults.slot(0, make_fault_memory);
  FaultCell& cell = slot->cells[static_cast<int>(kIndex)];
  report_fault(slot, kIndex, details(1), 1);
  // A second kernel has counted its entries, and looks at the cell after the host has.
  cell.entries += 2;
  CHECK(takes(faults, kIndex, 1, 3));
  uint32_t number = 0;
  CHECK(claim(cell, number));
  publish(cell, number, details(2));
  CHECK(takes(faults, kIndex, 2, 1));
  CHECK(!faults.take());
}

void check_each_device_has_its_own() {
  Faults faults;
  FaultSlot *const first = faults.slot(0, make_fault_memory), *const second =
                                                                  faults.slot(1, make_fault_memory);
  CHECK(first != second);
  report_fault(second, kIndex, details(2), 1);
  report_fault(first, kIndex, details(1), 1);
  CHECK(takes(faults, kIndex, 1, 1));
  CHECK(takes(faults, kIndex, 2, 1));
  CHECK(!faults.take());
}

// One thread is the device, this one the host.
void check_reports_while_the_host_reads() {
  constexpr int64_t kReports = 300'000;
  Faults faults;
  FaultSlot* const slot = faults.slot(0, make_fault_memory);
  std::atomic<bool> over{false};
  std::thread device([&] {
    for (int64_t n = 1; n <= kReports; ++n) report_fault(slot, kIndex, details(n), 1);
    over = true;
  });
  uint64_t entries = 0, reports = 0;
  int64_t last = 0;
  for (bool go_on = true; go_on;) {
    go_on = !over;
    while (const std::optional<Fault> f = faults.take()) {
      CHECK(is(f->details, f->details.entry) && f->details.entry > last);
      last = f->details.entry;
      entries += f->entries;
      ++reports;
    }
  }
  device.join();
  CHECK(reports > 0);
  // None is lost; one that was counted with the report before it counts again as its own.
  CHECK(entries >= static_cast<uint64_t>(kReports) && entries <= kReports + reports);
}

// Whether a slot is among more than the pool had until now.
bool is_handed_out(const FaultSlot* slot) {
  static int count = 0;
  count += 200;
  std::vector<std::shared_ptr<FaultSlot>> many;
  bool found = false;
  for (int k = 0; k < count; ++k) {
    many.push_back(make_fault_memory());
    found = found || many.back().get() == slot;
  }
  return found;
}

void check_a_slot_waits_for_its_kernels() {
  auto before = std::make_unique<Faults>();
  FaultSlot* const slot = before->slot(0, make_fault_memory);
  cuda_on_cpu_busy(1);
  {
    const FaultMemoryUse use(slot, nullptr);
  }
  before.reset();
  CHECK(!is_handed_out(slot));
  Faults after;
  CHECK(after.slot(0, make_fault_memory) != slot);
  report_fault(slot, kIndex, details(1), 1);  // the kernel comes late
  CHECK(!after.take());
  cuda_on_cpu_busy(0);
  CHECK(is_handed_out(slot));
  CHECK(!after.take());
  CHECK(cuda_on_cpu_events() == 0);
}

void check_a_slot_waits_for_every_stream() {
  const auto stream = [](uintptr_t n) { return reinterpret_cast<cudaStream_t>(n); };
  std::shared_ptr<FaultSlot> owned = make_fault_memory();
  FaultSlot* const slot = owned.get();
  {
    const FaultMemoryUse use(slot, stream(1));
  }
  {
    const FaultMemoryUse use(slot, stream(2));
  }
  cuda_on_cpu_busy(1);
  {
    const FaultMemoryUse use(slot, stream(1));
  }
  CHECK(cuda_on_cpu_events() == 2);
  owned.reset();
  CHECK(!is_handed_out(slot));
  cuda_on_cpu_busy(0);
  CHECK(is_handed_out(slot));
  CHECK(cuda_on_cpu_events() == 0);
}

void check_the_slot_of_a_graph_is_kept() {
  std::shared_ptr<FaultSlot> owned = make_fault_memory();
  FaultSlot* const slot = owned.get();
  {
    const FaultMemoryUse use(slot, nullptr);
  }
  cuda_on_cpu_capture(1);
  {
    const FaultMemoryUse use(slot, nullptr);
  }
  cuda_on_cpu_capture(0);
  {
    const FaultMemoryUse use(slot, nullptr);
  }
  owned.reset();
  CHECK(!is_handed_out(slot));
  CHECK(cuda_on_cpu_events() == 0);
}

void check_a_slot_without_kernels_is_free_at_once() {
  std::shared_ptr<FaultSlot> owned = make_fault_memory();
  FaultSlot* const slot = owned.get();
  owned.reset();
  CHECK(is_handed_out(slot));
}

}  // namespace
}  // namespace tiger_ext

int main() {
  using namespace tiger_ext;
  check_the_first_report_stays();
  check_kinds_do_not_displace_each_other();
  check_half_a_report_is_not_read();
  check_entries_are_told_once();
  check_each_device_has_its_own();
  check_reports_while_the_host_reads();
  check_a_slot_waits_for_its_kernels();
  check_a_slot_waits_for_every_stream();
  check_the_slot_of_a_graph_is_kept();
  check_a_slot_without_kernels_is_free_at_once();
  std::printf(failures ? "%d failures\n" : "all good\n", failures);
  return failures != 0;
}

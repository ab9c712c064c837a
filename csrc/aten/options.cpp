#include "options.h"

#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "../core/error.h"

namespace fa4::aten {
namespace {

// Every option by the name that fa4_ext_set_option() takes.
constexpr struct {
  const char* name;
  std::atomic<bool> Options::* value;
} kOptions[] = {
    {"strict", &Options::strict},
    {"speed_rules", &Options::speed_rules},
    {"prefer", &Options::prefer},
};

std::string names() {
  std::string text;
  for (const auto& option : kOptions) text += concat(text.empty() ? "" : ", ", option.name);
  return text;
}

// Every set that was ever in force is kept, once, because a call may be planning with it, also
// while the process exits.
std::atomic<const KernelSet*> disabled{new KernelSet};

const KernelSet& kept(KernelSet set) {
  static std::mutex mutex;
  static auto* const sets = new std::set<KernelSet>;
  std::lock_guard<std::mutex> lock(mutex);
  return *sets->insert(std::move(set)).first;
}

struct {
  std::atomic<Tile> tile{Tile{}};
  std::atomic<TileSchedule> schedule{TileSchedule{}};
  std::atomic<Decode> decode{Decode::kWhereFaster};
} overridden;

}  // namespace

Options& options() {
  static Options options;
  return options;
}

void set_option(const char* name, int value) {
  if (!name) fail("the name of an option is a null pointer");
  for (const auto& option : kOptions) {
    if (std::strcmp(option.name, name) != 0) continue;
    if (value != 0 && value != 1) fail("option ", name, " must be 0 or 1, is ", value);
    options().*option.value = value == 1;
    return;
  }
  fail("there is no option ", name, "; options are ", names());
}

void disable_kernels(const char* patterns) {
  if (!patterns) fail("the patterns of kernels to disable are a null pointer");
  constexpr const char* kSeparators = ", \t\n";
  KernelSet set;
  for (const char* next = patterns + std::strspn(patterns, kSeparators); *next;
       next += std::strspn(next, kSeparators)) {
    const std::string pattern(next, std::strcspn(next, kSeparators));
    if (!set.add(pattern)) {
      fail("no kernel of this build matches ", pattern,
           ", which is to be disabled; fa4_ext_manifest() has their names");
    }
    next += pattern.size();
  }
  disabled = &kept(std::move(set));
}

const KernelSet& disabled_kernels() { return *disabled.load(std::memory_order_acquire); }

Overrides overrides() {
  return {overridden.tile.load(std::memory_order_relaxed),
          overridden.schedule.load(std::memory_order_relaxed),
          overridden.decode.load(std::memory_order_relaxed)};
}

void set_overrides(const Overrides& overrides) {
  overridden.tile = overrides.tile;
  overridden.schedule = overrides.schedule;
  overridden.decode = overrides.decode;
}

}  // namespace fa4::aten

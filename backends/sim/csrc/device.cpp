#include "device.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace sim {
namespace {
std::atomic<int64_t> next_stream{1};
thread_local int here = 0;
thread_local int64_t stream_here[kMaxDevices] = {};

// Leaked on purpose: worker threads may outlive static destruction.
std::vector<std::unique_ptr<Device>>& all() {
  static auto* devices = [] {
    auto made = new std::vector<std::unique_ptr<Device>>;
    for (int i = 0; i < device_count(); i++) made->push_back(std::make_unique<Device>(i));
    return made;
  }();
  return *devices;
}
}  // namespace

int device_count() {
  static const int count = [] {
    const char* text = getenv("KTCORE_SIM_DEVICES");
    return std::clamp(text ? atoi(text) : 2, 0, kMaxDevices);
  }();
  return count;
}

Device& device(int index) {
  if (index < 0 || index >= device_count())
    throw std::out_of_range("there is no device sim:" + std::to_string(index) + "; there are " +
                            std::to_string(device_count()));
  return *all()[static_cast<size_t>(index)];
}

int current_device() { return here; }
void set_current_device(int index) { here = index; }
int64_t current_stream_id(int index) { return stream_here[index]; }
void set_current_stream(int index, int64_t id) { stream_here[index] = id; }
std::shared_ptr<Stream> current_stream(int index) { return device(index).stream(stream_here[index]); }

void close_all() {
  for (auto& d : all())
    for (auto& s : d->streams()) s->close();
}

std::shared_ptr<Stream> Device::stream(int64_t id) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = streams_.find(id);
  if (found != streams_.end()) return found->second;
  if (id != 0) throw std::runtime_error("stream " + std::to_string(id) + " of sim:" + std::to_string(index_) + " was destroyed");
  return streams_[0] = std::make_shared<Stream>(index_, 0, Timing{});
}

std::shared_ptr<Stream> Device::new_stream(Timing timing) {
  auto made = std::make_shared<Stream>(index_, next_stream++, timing);
  std::lock_guard<std::mutex> lock(mutex_);
  return streams_[made->id] = made;
}

void Device::destroy_stream(int64_t id) {
  std::shared_ptr<Stream> gone;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = streams_.find(id);
    if (found == streams_.end() || id == 0) return;
    gone = found->second;
    streams_.erase(found);
  }
  gone->close();
}

std::vector<std::shared_ptr<Stream>> Device::streams() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::shared_ptr<Stream>> found;
  for (auto& item : streams_) found.push_back(item.second);
  return found;
}

void Device::synchronize() {
  auto found = streams();
  for (auto& s : found) s->refuse_while_capturing("synchronize");
  blocked++;
  for (auto& s : found) s->sync();
  auto damage = memory.check();
  if (!damage.empty()) fail(damage);
  memory.guard_again();
  raise();
}

void Device::fail(std::string what) {
  std::lock_guard<std::mutex> lock(mutex_);
  errors_.push_back(std::move(what));
}

void Device::raise() {
  std::string first;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (errors_.empty()) return;
    first = errors_.front();
    if (errors_.size() > 1) first += " (and " + std::to_string(errors_.size() - 1) + " more after it)";
    errors_.clear();
  }
  throw std::runtime_error(first);
}

std::vector<std::string> Device::errors() {
  std::lock_guard<std::mutex> lock(mutex_);
  return errors_;
}

void Device::release(Block* block) {
  if (--block->holders > 0) return;
  memory.forget(block);
  auto users = memory.take_users(block);
  // the last of the streams to get here retires it
  auto left = std::make_shared<std::atomic<int>>(static_cast<int>(users.size()));
  for (auto& s : users)
    s->enqueue({Kind::Bookkeeping, "free", [this, block, left] {
                  if (--*left == 0) memory.retire(block);
                }});
}

void Device::count_fallback(const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex_);
  fallbacks_[name]++;
}

std::map<std::string, long> Device::fallbacks() {
  std::lock_guard<std::mutex> lock(mutex_);
  return fallbacks_;
}

}  // namespace sim

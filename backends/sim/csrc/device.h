// The simulated devices of this process: their memory, streams, late errors and counters.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "memory.h"
#include "stream.h"

namespace sim {

class Device {
 public:
  explicit Device(int index) : memory(index), index_(index) {}
  std::shared_ptr<Stream> stream(int64_t id);  // id 0 is the default stream; throws for one that was destroyed
  std::shared_ptr<Stream> new_stream(Timing timing);
  void destroy_stream(int64_t id);
  std::vector<std::shared_ptr<Stream>> streams();
  void synchronize();           // all streams, then raises what went wrong
  void fail(std::string what);  // keeps a late error
  void raise();                 // throws the first one kept and forgets it
  std::vector<std::string> errors();
  void release(Block* block);   // a holder is gone; with the last one the memory is retired in stream order
  void count_fallback(const std::string& name);
  std::map<std::string, long> fallbacks();

  Memory memory;
  std::atomic<long> launches{0}, blocked{0}, host_calls{0}, graphs{0};

 private:
  const int index_;
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<Stream>> streams_;
  std::vector<std::string> errors_;
  std::map<std::string, long> fallbacks_;
};

int device_count();
Device& device(int index);  // throws std::out_of_range
int current_device();
void set_current_device(int index);
std::shared_ptr<Stream> current_stream(int device);
int64_t current_stream_id(int device);
void set_current_stream(int device, int64_t id);
void close_all();  // before the interpreter goes

enum class HostTouch { Abort, Count };
void install_fault_handler();
void set_host_touch(HostTouch mode);
long host_touches();

}  // namespace sim

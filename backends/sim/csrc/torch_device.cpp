// The torch side of the device: allocator, pinned allocator, device guard, hooks, generator.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstring>

#include "tensors.h"

namespace sim {
namespace {

void free_block(void* context) {
  auto b = static_cast<Block*>(context);
  device(b->device).release(b);
}

c10::DataPtr allocate(size_t bytes, int index) {
  c10::Device where(kType, static_cast<c10::DeviceIndex>(index));
  if (bytes == 0) return {nullptr, where};
  auto stream = current_stream(index);
  Block* b = nullptr;
  try {
    b = device(index).memory.allocate(bytes, stream);
  } catch (const OutOfMemory& error) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, error.what());
  }
  if (auto graph = stream->capture()) {
    std::lock_guard<std::mutex> lock(graph->mutex);
    b->holders++;
    graph->blocks.push_back(b);
  }
  return {b->address, b, &free_block, where};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return sim::allocate(bytes, current_device()); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // the context is no data pointer
  void copy_data(void* to, const void* from, size_t bytes) const override {
    int index = current_device();
    auto& memory = device(index).memory;
    auto a = memory.alias_of(to), b = memory.alias_of(from);
    TORCH_CHECK(a && b, "sim: copy_data outside of device memory");
    launch(index, "copy_data", {}, [=] { memcpy(a, b, bytes); }, Kind::Transfer);
    block_on(index, "copy_data");
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(kType, &allocator);

struct PinnedRanges {
  std::mutex mutex;
  std::map<uintptr_t, size_t> ranges;
  size_t bytes = 0;
};
PinnedRanges& pinned() {
  static auto* made = new PinnedRanges;
  return *made;
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    size_t whole = std::max<size_t>((bytes + kPage - 1) / kPage * kPage, kPage);
    void* at = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(at != MAP_FAILED, "sim: no memory for a pinned buffer of ", bytes, " bytes");
    auto& p = pinned();
    std::lock_guard<std::mutex> lock(p.mutex);
    p.ranges[reinterpret_cast<uintptr_t>(at)] = whole;
    p.bytes += whole;
    return {at, at, &release, c10::Device(c10::kCPU)};
  }
  static void release(void* at) {
    auto& p = pinned();
    std::lock_guard<std::mutex> lock(p.mutex);
    auto found = p.ranges.find(reinterpret_cast<uintptr_t>(at));
    if (found == p.ranges.end()) return;
    munmap(at, found->second);
    p.bytes -= found->second;
    p.ranges.erase(found);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device d) const override {
    auto old = getDevice();
    setDevice(d);
    return old;
  }
  c10::Device getDevice() const override { return {kType, static_cast<c10::DeviceIndex>(current_device())}; }
  void setDevice(c10::Device d) const override {
    if (d.index() < 0) return;
    TORCH_CHECK(d.index() < device_count(), "there is no device ", d, "; there are ", device_count());
    set_current_device(d.index());
  }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.index() >= 0) set_current_device(d.index());
  }
  static c10::Stream made(c10::Device d, int64_t id) { return c10::Stream(c10::Stream::UNSAFE, d, id); }
  static c10::Device full(c10::Device d) {
    return {kType, d.index() < 0 ? static_cast<c10::DeviceIndex>(current_device()) : d.index()};
  }
  static std::shared_ptr<Stream> of(const c10::Stream& s) { return device(s.device_index()).stream(s.id()); }
  c10::Stream getStream(c10::Device d) const override { return made(full(d), current_stream_id(full(d).index())); }
  c10::Stream getDefaultStream(c10::Device d) const override { return made(full(d), 0); }
  c10::Stream getNewStream(c10::Device d, int) const override {
    d = full(d);
    return made(d, device(d.index()).new_stream(device(d.index()).stream(0)->timing())->id);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto old = getStream(s.device());
    set_current_stream(s.device_index(), s.id());
    return old;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(device_count()); }
  bool queryStream(const c10::Stream& s) const override { return of(s)->idle(); }
  void synchronizeStream(const c10::Stream& s) const override {
    auto stream = of(s);
    stream->refuse_while_capturing("synchronize");
    device(s.device_index()).blocked++;
    stream->sync();
    device(s.device_index()).raise();
  }
  void synchronizeDevice(const c10::DeviceIndex d) const override { device(d).synchronize(); }
  bool isStreamCapturing(const c10::Stream& s) const override { return of(s)->capture() != nullptr; }
  void record(void** event, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new Event;
    static_cast<Event*>(*event)->record(*of(s));
  }
  void block(void* event, const c10::Stream& s) const override {
    if (event) static_cast<Event*>(event)->make_wait(*of(s));
  }
  bool queryEvent(void* event) const override { return !event || static_cast<Event*>(event)->query(); }
  void synchronizeEvent(void* event) const override {
    if (event) static_cast<Event*>(event)->synchronize();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* a, void* b, const c10::DeviceIndex) const override {
    auto from = static_cast<Event*>(a)->mark(), to = static_cast<Event*>(b)->mark();
    TORCH_CHECK(from && to && from->done() && to->done(), "both events must have passed");
    return std::chrono::duration<double, std::milli>(to->when - from->when).count();
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& s) const override {
    if (auto b = static_cast<Block*>(data.get_context())) device(b->device).memory.record_user(b, of(s));
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(int index) {
    device_ = c10::Device(kType, static_cast<c10::DeviceIndex>(index));
    key_set_ = c10::DispatchKeySet(kKey);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(device_count()); }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device()); }
  void setCurrentDevice(c10::DeviceIndex d) const override { set_current_device(d); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override {
    auto old = getCurrentDevice();
    if (d >= 0) set_current_device(d);
    return old;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return exchangeDevice(d); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex d) const override {
    static std::mutex mutex;
    static auto* made = new std::map<int, at::Generator>;
    int index = d < 0 ? current_device() : d;
    std::lock_guard<std::mutex> lock(mutex);
    auto found = made->find(index);
    if (found == made->end()) found = made->emplace(index, at::make_generator<Generator>(index)).first;
    return found->second;
  }
  at::Generator getNewGenerator(c10::DeviceIndex d) const override { return at::make_generator<Generator>(std::max<int>(d, 0)); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    int index = storage.device().index();
    auto fresh = allocate(bytes, index);
    auto from = static_cast<Block*>(storage.data_ptr().get_context());
    size_t kept = std::min(bytes, storage.nbytes());
    if (from && kept) {
      auto to = static_cast<Block*>(fresh.get_context());
      launch(index, "resize", {{from, from->generation}, {to, to->generation}},
             [=] { memcpy(to->alias, from->alias, kept); }, Kind::Transfer);
    }
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.set_nbytes(bytes);
  }
};

// Hooks can be registered once a process, and importing this library is the moment that a device is wanted.
const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

}  // namespace

bool is_pinned(const void* address) {
  auto& p = pinned();
  auto at = reinterpret_cast<uintptr_t>(address);
  std::lock_guard<std::mutex> lock(p.mutex);
  auto next = p.ranges.upper_bound(at);
  return next != p.ranges.begin() && at < std::prev(next)->first + std::prev(next)->second;
}

size_t pinned_bytes() {
  std::lock_guard<std::mutex> lock(pinned().mutex);
  return pinned().bytes;
}

Block* block_of(const at::Tensor& t) { return static_cast<Block*>(t.storage().data_ptr().get_context()); }

at::Tensor alias(const at::Tensor& t, std::vector<Use>& uses) {
  Block* b = block_of(t);
  if (b) uses.push_back({b, b->generation});
  c10::InferenceMode plain;
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(),
                       c10::DataPtr(b ? b->alias : nullptr, c10::Device(c10::kCPU)));
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return made;
}

at::Tensor new_tensor(c10::IntArrayRef sizes, c10::IntArrayRef strides, at::ScalarType dtype, int index) {
  c10::DeviceGuard guard({kType, static_cast<c10::DeviceIndex>(index)});
  return at::detail::empty_strided_generic(sizes, strides, &allocator, c10::DispatchKeySet(kKey), dtype);
}

void launch(int index, const char* what, std::vector<Use> uses, std::function<void()> run, Kind kind) {
  device(index).launches++;
  current_stream(index)->push({kind, what, [uses = std::move(uses), run = std::move(run)] {
                                 for (auto& use : uses) use.check();
                                 try {
                                   run();
                                 } catch (const c10::Error& error) {
                                   throw std::runtime_error(error.what_without_backtrace());
                                 }
                               }});
}

void block_on(int index, const char* why) {
  auto stream = current_stream(index);
  stream->refuse_while_capturing(why);
  device(index).blocked++;
  stream->sync();
  device(index).raise();
}

void in_torch_worker(void (*loop)(void*), void* argument) {
  // One thread a stream: the teams of several would fight over the same cores.
  at::get_num_threads();
  at::init_num_threads();
  using Set = void (*)(int);
  using SetLocal = int (*)(int);
  if (auto set = reinterpret_cast<Set>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"))) set(1);
  if (auto set = reinterpret_cast<SetLocal>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"))) set(1);
  c10::InferenceMode plain;
  loop(argument);
}

}  // namespace sim

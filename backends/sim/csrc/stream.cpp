#include "stream.h"

#include <sys/prctl.h>

#include <stdexcept>

#include "device.h"

namespace sim {
namespace {

std::string name_of(const Stream& s) { return "sim:" + std::to_string(s.device) + " stream " + std::to_string(s.id); }

// SplitMix64 (Steele, Lea and Flood, 2014): good enough, and a function of the seed alone.
uint64_t next_random(uint64_t& state) {
  uint64_t z = state += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

void sleep_us(double us) { std::this_thread::sleep_for(std::chrono::duration<double, std::micro>(us)); }

}  // namespace

Stream::Stream(int device, int64_t id, Timing timing) : device(device), id(id), timing_(timing), random_(timing.seed) {}

Stream::~Stream() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  more_.notify_all();
  // a task of this very stream may hold the last reference
  if (thread_.get_id() == std::this_thread::get_id()) thread_.detach();
  else thread_.join();
}

void Stream::push(Task task) {
  if (auto graph = capture()) graph->add(this, std::move(task));
  else enqueue(std::move(task));
}

void Stream::enqueue(Task task) {
  bool inline_now = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) {
      inline_now = true;  // only memory that is given back after its stream comes here
    } else {
      queue_.push_back(std::move(task));
      if (!started_) {
        started_ = true;
        thread_ = std::thread([this] { in_torch_worker(&Stream::loop, this); });
      }
    }
  }
  if (!inline_now) return more_.notify_one();
  if (task.kind != Kind::Bookkeeping) throw std::runtime_error(name_of(*this) + " was destroyed");
  try {
    task.run();
  } catch (const std::exception& error) {
    sim::device(device).fail(error.what());
  }
}

void Stream::sync() {
  std::unique_lock<std::mutex> lock(mutex_);
  drained_.wait(lock, [this] { return queue_.empty() && !busy_; });
}

bool Stream::idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  return queue_.empty() && !busy_;
}

void Stream::close() {
  sync();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  more_.notify_all();
  if (thread_.joinable() && thread_.get_id() != std::this_thread::get_id()) thread_.join();
}

void Stream::set_timing(Timing timing) {
  std::lock_guard<std::mutex> lock(mutex_);
  timing_ = timing;
  random_ = timing.seed;
}

Timing Stream::timing() {
  std::lock_guard<std::mutex> lock(mutex_);
  return timing_;
}

double Stream::drawn_us() { return drawn_; }

std::shared_ptr<Graph> Stream::capture() {
  std::lock_guard<std::mutex> lock(mutex_);
  return capture_;
}

void Stream::set_capture(std::shared_ptr<Graph> graph) {
  std::lock_guard<std::mutex> lock(mutex_);
  capture_ = std::move(graph);
}

void Stream::refuse_while_capturing(const char* what) {
  if (capture()) throw std::runtime_error(name_of(*this) + " is being captured, which does not allow " + what);
}

void Stream::loop(void* self) { static_cast<Stream*>(self)->work(); }

void Stream::work() {
  prctl(PR_SET_TIMERSLACK, 1000ul);  // nanoseconds: delays of microseconds must not become 50 of them
  prctl(PR_SET_NAME, "sim-stream");
  for (;;) {
    Task task;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      if (queue_.empty()) {
        busy_ = false;
        drained_.notify_all();
        more_.wait(lock, [this] { return !queue_.empty() || closing_; });
        if (queue_.empty()) return;
      }
      task = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
    }
    pause(task);
    try {
      run_guarded(task);
    } catch (const std::exception& error) {
      sim::device(device).fail(name_of(*this) + ", " + task.what + ": " + error.what());
    } catch (...) {
      sim::device(device).fail(name_of(*this) + ", " + task.what + ": unknown exception");
    }
  }
}

void Stream::pause(const Task& task) {
  if (task.kind == Kind::Bookkeeping) return;
  auto t = timing();
  double wait = task.kind == Kind::Work ? t.latency_us : 0;
  if (t.delay_us > 0) {
    double drawn = t.delay_us * static_cast<double>(next_random(random_) >> 11) * 0x1p-53;
    drawn_ = drawn_ + drawn;
    wait += drawn;
  }
  if (wait > 0) sleep_us(wait);
}

void Mark::set() {
  std::lock_guard<std::mutex> lock(mutex_);
  when = std::chrono::steady_clock::now();
  done_ = true;
  passed_.notify_all();
}

void Mark::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  passed_.wait(lock, [this] { return done_; });
}

bool Mark::done() {
  std::lock_guard<std::mutex> lock(mutex_);
  return done_;
}

std::shared_ptr<Mark> Event::mark() {
  std::lock_guard<std::mutex> lock(mutex_);
  return mark_;
}

void Event::record(Stream& stream) {
  auto made = std::make_shared<Mark>();
  made->stream = stream.shared_from_this();
  if (auto graph = stream.capture()) {
    std::lock_guard<std::mutex> lock(graph->mutex);
    made->graph = graph.get();
    made->number = graph->marks++;
    graph->nodes.push_back({Node::Record, graph->lane_of(&stream), {}, made->number});
  } else {
    stream.enqueue({Kind::Bookkeeping, "event", [made] { made->set(); }});
  }
  std::lock_guard<std::mutex> lock(mutex_);
  mark_ = std::move(made);
}

void Event::make_wait(Stream& stream) {
  auto at = mark();
  if (!at) return;  // never recorded: nothing to wait for
  auto graph = stream.capture();
  if (!at->graph) {
    if (graph) throw std::runtime_error(name_of(stream) + " is being captured and cannot wait for an event from outside of the capture");
    return stream.enqueue({Kind::Bookkeeping, "wait", [at] { at->wait(); }});
  }
  auto origin = at->stream->capture();
  if (origin.get() != at->graph) throw std::runtime_error("an event recorded in a capture passes in its replays only");
  if (graph && graph != origin) throw std::runtime_error(name_of(stream) + " is being captured by another graph");
  std::lock_guard<std::mutex> lock(origin->mutex);
  if (!graph) stream.set_capture(origin);
  origin->nodes.push_back({Node::Wait, origin->lane_of(&stream), {}, at->number});
}

bool Event::query() {
  auto at = mark();
  if (at && at->graph) throw std::runtime_error("an event recorded in a capture passes in its replays only");
  return !at || at->done();
}

void Event::synchronize() {
  auto at = mark();
  if (!at) return;
  if (at->graph) throw std::runtime_error("an event recorded in a capture passes in its replays only");
  auto& d = sim::device(at->stream->device);
  d.blocked++;
  at->wait();
  d.raise();
}

}  // namespace sim

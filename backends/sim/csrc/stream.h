// Streams, events and graphs of the simulated accelerator: one worker thread a stream, with seeded delays.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "memory.h"

namespace sim {

class Stream;
struct Graph;

// Work takes delay and latency, transfers (copies, host calls) the delay alone, bookkeeping neither.
enum class Kind { Work, Transfer, Bookkeeping };

struct Task {
  Kind kind;
  const char* what;  // for messages; outlives the task
  std::function<void()> run;
};

struct Timing {
  uint64_t seed = 0;
  double delay_us = 0;    // each task starts up to so much later, drawn from the seed
  double latency_us = 0;  // each piece of work takes at least so much longer
};

// One recording of an event.
struct Mark {
  void set();
  void wait();
  bool done();
  Graph* graph = nullptr;  // recorded while this graph was captured: passes in its replays only
  int number = 0;
  std::shared_ptr<Stream> stream;
  std::chrono::steady_clock::time_point when;

 private:
  std::mutex mutex_;
  std::condition_variable passed_;
  bool done_ = false;
};

struct Event {
  std::shared_ptr<Mark> mark();
  void record(Stream& stream);
  void make_wait(Stream& stream);  // later work of `stream` starts after this
  bool query();
  void synchronize();  // raises the device's late errors

 private:
  std::mutex mutex_;
  std::shared_ptr<Mark> mark_;
};

struct Node {
  enum Type { Launch, Record, Wait } type;
  int lane;
  Task task;   // Launch
  int number;  // Record, Wait: of the mark
};

// Recorded launches. Holds the memory that was allocated while it was recorded.
struct Graph : std::enable_shared_from_this<Graph> {
  int device = 0, marks = 0;
  std::vector<Stream*> lanes;  // while recording; lane 0 is the one that began
  std::vector<Node> nodes;
  std::vector<Block*> blocks;
  std::vector<std::shared_ptr<Stream>> helpers;  // play lanes 1, 2, …
  std::mutex mutex;
  ~Graph();
  int lane_of(Stream* stream);
  void add(Stream* stream, Task task);
  void check_joined() const;
  void replay(std::shared_ptr<Stream> stream);
};

class Stream : public std::enable_shared_from_this<Stream> {
 public:
  Stream(int device, int64_t id, Timing timing);
  ~Stream();
  void push(Task task);     // runs it in order, or records it while a capture is on
  void enqueue(Task task);  // runs it in order, always
  void sync();              // waits; does not raise late errors
  bool idle();
  void close();  // drains and ends the thread
  void set_timing(Timing timing);
  Timing timing();
  double drawn_us();  // sum of the delays that its tasks have drawn
  std::shared_ptr<Graph> capture();
  void set_capture(std::shared_ptr<Graph> graph);
  void refuse_while_capturing(const char* what);

  const int device;
  const int64_t id;

 private:
  static void loop(void* self);
  void work();
  void pause(const Task& task);

  std::mutex mutex_;
  std::condition_variable more_, drained_;
  std::deque<Task> queue_;
  bool busy_ = false, closing_ = false, started_ = false;
  std::thread thread_;
  Timing timing_;
  uint64_t random_ = 0;
  std::atomic<double> drawn_{0};
  std::shared_ptr<Graph> capture_;
};

std::shared_ptr<Graph> begin_capture(Stream& stream);
void end_capture(const std::shared_ptr<Graph>& graph, bool keep);

// Runs `loop` with torch set up for a worker thread; defined beside the operators.
void in_torch_worker(void (*loop)(void*), void* argument);
// Runs `task` so that a memory fault in it becomes an exception; defined beside the fault handler.
void run_guarded(const Task& task);
// For what is left of this task, a fault ends the process: frames of the interpreter cannot be jumped out of.
void disarm_fault_handler();

}  // namespace sim

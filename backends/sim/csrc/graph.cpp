// Capture and replay: launches are recorded with the events that order them, and played again with fresh ones.
#include <algorithm>
#include <stdexcept>

#include "device.h"

namespace sim {

Graph::~Graph() {
  auto& d = sim::device(device);
  nodes.clear();
  for (Block* b : blocks) d.release(b);
  d.graphs--;
}

int Graph::lane_of(Stream* stream) {
  auto found = std::find(lanes.begin(), lanes.end(), stream);
  if (found != lanes.end()) return static_cast<int>(found - lanes.begin());
  lanes.push_back(stream);
  return static_cast<int>(lanes.size()) - 1;
}

void Graph::add(Stream* stream, Task task) {
  std::lock_guard<std::mutex> lock(mutex);
  int lane = lane_of(stream);
  nodes.push_back({Node::Launch, lane, std::move(task), 0});
}

// Each forked lane must end in an event that another lane waits for, or a replay would end before its work does.
void Graph::check_joined() const {
  for (int lane = 1; lane < static_cast<int>(lanes.size()); lane++) {
    auto last = std::find_if(nodes.rbegin(), nodes.rend(), [&](const Node& n) { return n.lane == lane; });
    bool joined = last != nodes.rend() && last->type == Node::Record &&
                  std::any_of(nodes.begin(), nodes.end(), [&](const Node& n) {
                    return n.type == Node::Wait && n.number == last->number && n.lane != lane;
                  });
    if (!joined) throw std::runtime_error("the capture ends while a stream that follows it has work nobody waits for");
  }
}

void Graph::replay(std::shared_ptr<Stream> stream) {
  if (stream->device != device) throw std::runtime_error("a graph replays on the device that it was captured on");
  stream->refuse_while_capturing("replay of another graph");
  std::vector<std::shared_ptr<Mark>> fresh(static_cast<size_t>(marks));
  for (auto& m : fresh) m = std::make_shared<Mark>();
  std::vector<std::shared_ptr<Stream>> on{stream};
  on.insert(on.end(), helpers.begin(), helpers.end());
  auto start = std::make_shared<Mark>();
  stream->enqueue({Kind::Bookkeeping, "replay", [start] { start->set(); }});
  for (size_t i = 1; i < on.size(); i++) on[i]->enqueue({Kind::Bookkeeping, "replay", [start] { start->wait(); }});
  for (auto& n : nodes) {
    auto& s = on[static_cast<size_t>(n.lane)];
    auto mark = n.type == Node::Launch ? nullptr : fresh[static_cast<size_t>(n.number)];
    auto launch = &n;
    if (n.type == Node::Launch) s->enqueue({n.task.kind, n.task.what, [launch] { launch->task.run(); }});
    else if (n.type == Node::Record) s->enqueue({Kind::Bookkeeping, "event", [mark] { mark->set(); }});
    else s->enqueue({Kind::Bookkeeping, "wait", [mark] { mark->wait(); }});
  }
  std::vector<std::shared_ptr<Mark>> ends;
  for (size_t i = 1; i < on.size(); i++) {
    ends.push_back(std::make_shared<Mark>());
    on[i]->enqueue({Kind::Bookkeeping, "replay", [mark = ends.back()] { mark->set(); }});
  }
  // The graph and its memory outlive what is under way; never dropped on a helper, which could not join itself.
  stream->enqueue({Kind::Bookkeeping, "replay", [ends, self = shared_from_this()] {
                     for (auto& mark : ends) mark->wait();
                   }});
}

std::shared_ptr<Graph> begin_capture(Stream& stream) {
  stream.refuse_while_capturing("another capture");
  auto graph = std::make_shared<Graph>();
  graph->device = stream.device;
  graph->lanes.push_back(&stream);
  device(stream.device).graphs++;
  stream.set_capture(graph);
  return graph;
}

void end_capture(const std::shared_ptr<Graph>& graph, bool keep) {
  for (Stream* s : graph->lanes) s->set_capture(nullptr);
  if (!keep) return graph->nodes.clear();
  graph->check_joined();
  for (size_t i = 1; i < graph->lanes.size(); i++) {
    auto timing = graph->lanes[i]->timing();
    graph->helpers.push_back(std::make_shared<Stream>(graph->device, -1 - static_cast<int64_t>(i), timing));
  }
  graph->lanes.resize(1);
}

}  // namespace sim

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "calls.h"

namespace dance {
namespace {

// Lets this thread run soon after it wakes, even if a step on the same core computes for long: Linux
// (6.12 and newer) prefers threads that ask for a short time slice. If Linux refuses, nothing changes.
// (measured) With a callee of one core that computes a prompt, the p99 gap of a stream was 10 ms
// instead of 13.
void RunSoon() {
#ifdef __linux__
  constexpr uint64_t kKeepPolicy = 8;
  struct {
    uint32_t size = 48, policy = 0;
    uint64_t flags = kKeepPolicy;
    int32_t nice = getpriority(PRIO_PROCESS, 0);
    uint32_t priority = 0;
    uint64_t runtime_ns = 100'000, deadline = 0, period = 0;
  } wanted;
  syscall(SYS_sched_setattr, 0, &wanted, 0);
#endif
}

// Maximum number of rows computed together when several calls for the same layer wait.
constexpr uint32_t kMostTogether = 1024;

}  // namespace

Answerer::Answerer(CallServer& server) : server_(server) {
  if (pipe(wake_) != 0) {
    std::fprintf(stderr, "dance_jax: the thread that answers expert calls cannot start: pipe: %s\n",
                 std::strerror(errno));
    std::abort();
  }
  for (const int end : wake_) fcntl(end, F_SETFL, O_NONBLOCK);
  thread_ = std::thread([this] { Serve(); });
}

Answerer::~Answerer() {
  {
    const std::lock_guard<std::mutex> lock(accepted_mutex_);
    stop_ = true;
  }
  Wake();
  thread_.join();
  for (const auto& [peer, fd] : accepted_) close(fd);
  for (const int end : wake_) close(end);
}

void Answerer::Accept(int peer, int fd) {
  {
    const std::lock_guard<std::mutex> lock(accepted_mutex_);
    accepted_.emplace_back(peer, fd);
  }
  Wake();
}

void Answerer::Wake() {
  const char byte = 0;
  // A full pipe wakes the thread as well.
  [[maybe_unused]] const ssize_t written = write(wake_[1], &byte, 1);
}

void Answerer::Serve() {
  RunSoon();
  // New connections are adopted between any two calls, because the queue of calls may never empty.
  while (Adopt()) {
    Poll(calls_.empty());
    if (!calls_.empty()) AnswerNext();
    std::erase_if(lines_, [](const auto& line) { return line->channel->closed(); });
  }
}

bool Answerer::Adopt() {
  const std::lock_guard<std::mutex> lock(accepted_mutex_);
  if (stop_) return false;
  for (const auto& [peer, fd] : accepted_) {
    lines_.push_back(std::make_shared<Line>(Line{peer, std::make_unique<Channel>(fd)}));
  }
  accepted_.clear();
  return true;
}

void Answerer::Poll(bool wait) {
  std::vector<pollfd> polled{{wake_[0], POLLIN, 0}};
  for (const auto& line : lines_) {
    polled.push_back({line->channel->fd(), line->channel->Events(line->Reads()), 0});
  }
  if (poll(polled.data(), polled.size(), wait ? -1 : 0) <= 0) return;
  if (polled[0].revents) {
    char bytes[64];
    while (read(wake_[0], bytes, sizeof(bytes)) > 0) {
    }
  }
  const CallSpec& spec = server_.spec();
  for (size_t i = 0; i < lines_.size(); ++i) {
    const short happened = polled[i + 1].revents;
    const std::shared_ptr<Line>& line = lines_[i];
    // Flush notices a connection that has ended, also while the connection is not read.
    if (happened & ~POLLIN) line->channel->Flush();
    if ((happened & ~POLLOUT) == 0 || !line->Reads()) continue;
    line->channel->Read<CallHead>(spec.wire, spec.most_rows, [&](const CallHead& head,
                                                                 const char* body) {
      const char* const end = body + head.BodyBytes(spec.wire);
      calls_.push_back({line, head, std::vector<char>(body, end), NowNs()});
      ++line->waiting;
      return line->Reads();
    });
  }
}

Answerer::Content Answerer::ReadBody(const Call& call) const {
  Content content;
  const CallHead& head = call.head;
  const char* at = call.body.data();
  content.counts = reinterpret_cast<const uint8_t*>(at);
  at += head.rows;
  content.experts.resize(head.pairs);
  const Wire& wire = server_.spec().wire;
  for (uint16_t& expert : content.experts) {
    std::memcpy(&expert, at, wire.NumberBytes());
    at += wire.NumberBytes();
  }
  content.weights.resize(head.pairs);
  for (float& weight : content.weights) {
    weight = wire.DecodeWeight(at);
    at += wire.WeightBytes();
  }
  content.rows = at;
  uint32_t pairs = 0;
  for (uint32_t r = 0; r < head.rows; ++r) pairs += content.counts[r];
  const CallSpec& spec = server_.spec();
  // An expert number that is too large would name an expert of another layer.
  content.sane = head.layer < spec.layers && pairs == head.pairs &&
                 std::all_of(content.experts.begin(), content.experts.end(),
                             [&](uint16_t expert) { return expert < spec.experts; });
  return content;
}

void Answerer::AnswerNext() {
  const int64_t begin = NowNs();
  const std::vector<Call> calls = TakeNext();
  std::vector<Content> contents;
  std::vector<int32_t> wanted;
  for (const Call& call : calls) {
    const Content& content = contents.emplace_back(ReadBody(call));
    wanted.insert(wanted.end(), content.experts.begin(), content.experts.end());
  }
  const Held held = server_.Find(calls.front().head.layer, wanted);
  for (Content& content : contents) FindMissing(held, content);
  const std::vector<float> y = Compute(calls, contents, held);
  const int64_t end = NowNs(), d = server_.spec().wire.d;
  server_.Sum([&](CallSums& sums) {
    sums.served_s += 1e-9 * (end - begin);
    sums.served_batches += !y.empty();
  });
  const float* sums = y.data();
  for (size_t i = 0; i < calls.size(); ++i) {
    AnswerHead head;
    head.id = calls[i].head.id, head.version = server_.tables()->front()->version;
    head.queued_us = (begin - calls[i].arrived) / 1000, head.computed_us = (end - begin) / 1000;
    if (contents[i].here) {
      head.rows = calls[i].head.rows, head.missing = contents[i].missing.size();
    } else {
      head.status = Status::kNotHere;
    }
    const int peer = calls[i].line->peer;
    server_.Count(peer, PeerCounters::kAnswered, 1);
    server_.Count(peer, PeerCounters::kAnsweredRows, head.rows);
    server_.Count(peer, PeerCounters::kQueuedNs, begin - calls[i].arrived);
    Answer(calls[i], head, sums, contents[i].missing);
    sums += head.rows * d;
    if (Trace* const trace = server_.trace()) {
      TraceEvent event{.begin = calls[i].arrived, .end = end, .arrived = calls[i].arrived};
      event.compute_begin = begin, event.compute_end = end;
      event.step = calls[i].head.step, event.id = head.id;
      event.kind = TraceEvent::kServed, event.layer = calls[i].head.layer, event.peer = peer;
      event.rows = calls[i].head.rows, event.calls = calls.size();
      const bool whole = contents[i].here && contents[i].missing.empty();
      event.outcome = whole ? TraceEvent::kAnswered : TraceEvent::kRefused;
      trace->Add(event);
    }
  }
}

std::vector<Answerer::Call> Answerer::TakeNext() {
  const uint16_t layer = calls_.front().head.layer;
  std::vector<Call> taken;
  uint32_t rows = 0;
  std::erase_if(calls_, [&](Call& call) {
    const bool fits = taken.empty() || rows + call.head.rows <= kMostTogether;
    if (call.head.layer != layer || !fits) return false;
    rows += call.head.rows;
    --call.line->waiting;
    taken.push_back(std::move(call));
    return true;
  });
  return taken;
}

void Answerer::FindMissing(const Held& held, Content& content) {
  std::vector<uint16_t>& missing = content.missing;
  std::copy_if(content.experts.begin(), content.experts.end(), std::back_inserter(missing),
               [&](uint16_t expert) { return held.Place(expert) < 0; });
  content.here = content.sane && (missing.empty() || missing.size() < content.experts.size());
  std::sort(missing.begin(), missing.end());
  missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
}

std::vector<float> Answerer::Compute(const std::vector<Call>& calls,
                                     const std::vector<Content>& contents, const Held& held) {
  const Wire& wire = server_.spec().wire;
  int64_t rows = 0, most = 1;
  for (size_t i = 0; i < calls.size(); ++i) {
    if (!contents[i].here) continue;
    rows += calls[i].head.rows;
    for (uint32_t r = 0; r < calls[i].head.rows; ++r) {
      most = std::max<int64_t>(most, contents[i].counts[r]);
    }
  }
  std::vector<float> x(rows * wire.d), weight(rows * most, 0.0f), y(rows * wire.d);
  std::vector<int32_t> expert(rows * most, -1);
  size_t row = 0;
  for (size_t i = 0; i < calls.size(); ++i) {
    const Content& content = contents[i];
    if (!content.here) continue;
    size_t pair = 0;
    for (uint32_t r = 0; r < calls[i].head.rows; ++r, ++row) {
      wire.Decode(content.rows + r * wire.RowBytes(), &x[row * wire.d]);
      for (size_t k = 0; k < content.counts[r]; ++k, ++pair) {
        expert[row * most + k] = held.Place(content.experts[pair]);
        weight[row * most + k] = content.weights[pair];
      }
    }
  }
  if (rows > 0) server_.Compute(held, {x.data(), expert.data(), weight.data(), rows, most}, y.data());
  return y;
}

void Answerer::Answer(const Call& call, const AnswerHead& head, const float* sums,
                      const std::vector<uint16_t>& missing) {
  const Wire& wire = server_.spec().wire;
  const size_t bytes = head.rows * wire.d * sizeof(float);
  std::vector<char> message(sizeof(head) + head.BodyBytes(wire));
  std::memcpy(message.data(), &head, sizeof(head));
  std::memcpy(message.data() + sizeof(head), sums, bytes);
  std::memcpy(message.data() + sizeof(head) + bytes, missing.data(),
              head.missing * sizeof(uint16_t));
  server_.Count(call.line->peer, PeerCounters::kBytesSent, message.size());
  server_.Count(call.line->peer, PeerCounters::kBytesReceived,
                sizeof(CallHead) + call.body.size());
  if (!call.line->channel->closed()) call.line->channel->Send(std::move(message));
}

}  // namespace dance

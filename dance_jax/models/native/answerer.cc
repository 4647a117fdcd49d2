#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "calls.h"

namespace dance {
namespace {

// Rows that are computed in one go, where calls for a layer wait together.
constexpr uint32_t kMostTogether = 1024;

}  // namespace

Answerer::Answerer(CallServer& server) : server_(server) {
  if (pipe(wake_) != 0) std::abort();
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
  // Where the pipe is full it wakes the thread as well.
  [[maybe_unused]] const ssize_t written = write(wake_[1], &byte, 1);
}

void Answerer::Serve() {
  // New connections are taken over between any two calls: there may be calls without end.
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
    // A connection that has ended says so where it is not read as well.
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
  std::memcpy(content.experts.data(), at, head.pairs * sizeof(uint16_t));
  at += head.pairs * sizeof(uint16_t);
  content.weights.resize(head.pairs);
  std::memcpy(content.weights.data(), at, head.pairs * sizeof(float));
  content.rows = at + head.pairs * sizeof(float);
  uint32_t pairs = 0;
  for (uint32_t r = 0; r < head.rows; ++r) pairs += content.counts[r];
  const CallSpec& spec = server_.spec();
  // The number of an expert that a layer has not would be that of another layer's.
  content.sane = head.layer < spec.layers && pairs == head.pairs &&
                 std::all_of(content.experts.begin(), content.experts.end(),
                             [&](uint16_t expert) { return expert < spec.experts; });
  return content;
}

// Answers the call that has waited longest, and with it those for the same layer.
void Answerer::AnswerNext() {
  const Wire& wire = server_.spec().wire;
  const int64_t layer = calls_.front().head.layer, begin = NowNs();
  std::vector<Call> together;
  uint32_t rows = 0;
  std::erase_if(calls_, [&](Call& call) {
    const bool fits = together.empty() || rows + call.head.rows <= kMostTogether;
    if (call.head.layer != layer || !fits) return false;
    rows += call.head.rows;
    --call.line->waiting;
    together.push_back(std::move(call));
    return true;
  });

  std::vector<Content> contents(together.size());
  std::vector<int32_t> wanted;
  size_t most = 1;
  for (size_t i = 0; i < together.size(); ++i) {
    contents[i] = ReadBody(together[i]);
    wanted.insert(wanted.end(), contents[i].experts.begin(), contents[i].experts.end());
  }
  const Held held = server_.Find(layer, wanted);

  // The calls of which anything is here, and what is not.
  std::vector<bool> here(together.size());
  std::vector<std::vector<uint16_t>> missing(together.size());
  rows = 0;
  for (size_t i = 0; i < together.size(); ++i) {
    const Content& content = contents[i];
    std::copy_if(content.experts.begin(), content.experts.end(), std::back_inserter(missing[i]),
                 [&](uint16_t expert) { return held.Place(expert) < 0; });
    here[i] = content.sane && (missing[i].empty() || missing[i].size() < content.experts.size());
    if (!here[i]) continue;
    std::sort(missing[i].begin(), missing[i].end());
    missing[i].erase(std::unique(missing[i].begin(), missing[i].end()), missing[i].end());
    rows += together[i].head.rows;
    for (uint32_t r = 0; r < together[i].head.rows; ++r) {
      most = std::max<size_t>(most, content.counts[r]);
    }
  }
  std::vector<float> x(rows * wire.d), weight(rows * most, 0.0f), y(rows * wire.d);
  std::vector<int32_t> expert(rows * most, -1);
  size_t row = 0;
  for (size_t i = 0; i < together.size(); ++i) {
    if (!here[i]) continue;
    const Content& content = contents[i];
    size_t pair = 0;
    for (uint32_t r = 0; r < together[i].head.rows; ++r, ++row) {
      wire.Decode(content.rows + r * wire.RowBytes(), &x[row * wire.d]);
      for (size_t k = 0; k < content.counts[r]; ++k, ++pair) {
        expert[row * most + k] = held.Place(content.experts[pair]);
        weight[row * most + k] = content.weights[pair];
      }
    }
  }
  if (rows > 0) {
    const auto k = static_cast<int64_t>(most);
    server_.Compute(held, {x.data(), expert.data(), weight.data(), rows, k}, y.data());
  }
  const int64_t end = NowNs();
  server_.Sum([&](CallSums& sums) {
    sums.served_s += 1e-9 * (end - begin);
    sums.served_rows += rows;
  });
  const float* sums = y.data();
  for (size_t i = 0; i < together.size(); ++i) {
    const Call& call = together[i];
    AnswerHead head;
    head.id = call.head.id, head.version = server_.tables()->front()->version;
    head.queued_us = (begin - call.arrived) / 1000, head.computed_us = (end - begin) / 1000;
    if (here[i]) {
      head.rows = call.head.rows, head.missing = missing[i].size();
    } else {
      head.status = Status::kNotHere;
    }
    server_.Count(call.line->peer, PeerCounters::kAnswered, 1);
    server_.Count(call.line->peer, PeerCounters::kAnsweredRows, head.rows);
    server_.Count(call.line->peer, PeerCounters::kQueuedNs, begin - call.arrived);
    Answer(call, head, sums, missing[i]);
    if (here[i]) sums += head.rows * wire.d;
  }
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

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "calls.h"

namespace dance {
namespace {

// Servers up to which every set of them is weighed (placement/visit.py).
constexpr int kExactServers = 8;
// A call is late after so many times what it was expected to take, and fails after so many.
constexpr double kLate = 3, kFailed = 10;
// How long a row waits for a table by which somebody has what others have refused.
constexpr int64_t kPatienceNs = 500'000'000;
// How often a wait looks for a new table or connection.
constexpr int64_t kLookNs = 5'000'000, kLookSeldomNs = 100'000'000;
// Weight of the latest answer in a pace; bytes up to which an answer says how long a small one takes.
constexpr double kLearn = 0.2;
constexpr size_t kSmall = 8192;
// Bits of a call's number beside the device.
constexpr int kCallBits = 48;

bool Meets(const std::vector<Ranks>& holders, const Ranks& chosen) {
  return std::all_of(holders.begin(), holders.end(), [&](const Ranks& own) {
    return own.none() || (own & chosen).any();
  });
}

// Extends `chosen` by `more` servers from `from` on, lowest numbers first; false: no such set will do.
bool ChooseMore(const std::vector<Ranks>& holders, int servers, int from, int more, Ranks& chosen) {
  if (more == 0) return Meets(holders, chosen);
  for (int n = from; n <= servers - more; ++n) {
    chosen.set(n);
    if (ChooseMore(holders, servers, n + 1, more - 1, chosen)) return true;
    chosen.reset(n);
  }
  return false;
}

Ranks Fewest(const std::vector<Ranks>& holders, int servers) {
  Ranks chosen;
  if (servers <= kExactServers) {
    for (int size = 0; !ChooseMore(holders, servers, 0, size, chosen); ++size) {
    }
    return chosen;
  }
  while (!Meets(holders, chosen)) {
    std::vector<int> gain(servers, 0);
    for (const Ranks& own : holders) {
      if ((own & chosen).any()) continue;
      for (int n = 0; n < servers; ++n) gain[n] += own[n];
    }
    chosen.set(std::max_element(gain.begin(), gain.end()) - gain.begin());
  }
  return chosen;
}

}  // namespace

std::vector<int> ChooseServers(const std::vector<Ranks>& holders, int servers) {
  const Ranks chosen = Fewest(holders, servers);
  std::vector<int> found;
  for (const Ranks& own : holders) {
    const Ranks both = own & chosen;
    int first = 0;
    while (first < servers && !both[first]) ++first;
    found.push_back(first < servers ? first : -1);
  }
  return found;
}

void Caller::Pace::Learn(size_t bytes, double s) {
  // A server that stopped once is not slow from then on.
  s = std::min(s, kFailed * Expected(bytes));
  if (bytes <= kSmall) {
    base_s += kLearn * (s - base_s);
  } else {
    byte_s += kLearn * (std::max(0.0, s - base_s) / bytes - byte_s);
  }
}

// No two devices' calls have the same number.
Caller::Caller(CallServer& server, int64_t device)
    : server_(server),
      device_(device),
      lines_(server.spec().servers),
      next_id_(1 + (device << kCallBits)) {}

Caller::~Caller() {
  for (const auto& [peer, fd] : dialled_) close(fd);
}

void Caller::Dial(int peer, int fd) {
  const std::lock_guard<std::mutex> lock(dialled_mutex_);
  dialled_.emplace_back(peer, fd);
}

void Caller::Adopt() {
  const std::lock_guard<std::mutex> lock(dialled_mutex_);
  for (const auto& [peer, fd] : dialled_) {
    Line& line = lines_[peer];
    Lose(peer);
    line.channel = std::make_unique<Channel>(fd);
    line.suspect = false;
    // What the old connection took along is lost.
    for (size_t i = 0; i < parts_.size(); ++i) {
      if (parts_[i].state != Part::kWaiting || parts_[i].peer != peer) continue;
      server_.Count(peer, PeerCounters::kLost, 1);
      Replace(parts_[i], 0);
    }
  }
  dialled_.clear();
}

void Caller::Lose(int peer) {
  std::vector<Sent>& unanswered = lines_[peer].unanswered;
  for (const Sent& sent : unanswered) Record(peer, sent, TraceEvent::kLost, AnswerHead());
  unanswered.clear();
}

void Caller::Record(int peer, const Sent& sent, TraceEvent::Outcome outcome,
                    const AnswerHead& head) const {
  Trace* const trace = server_.trace();
  if (trace == nullptr) return;
  TraceEvent event{.begin = sent.at, .end = NowNs(), .step = sent.step, .kind = TraceEvent::kCall};
  if (outcome == TraceEvent::kAnswered || outcome == TraceEvent::kRefused) {
    const int64_t queued = 1000 * int64_t{head.queued_us};
    const int64_t computed = 1000 * int64_t{head.computed_us};
    const int64_t wire = std::max<int64_t>(event.end - event.begin - queued - computed, 0);
    event.arrived = event.begin + wire / 2;
    event.compute_begin = std::min(event.arrived + queued, event.end);
    event.compute_end = std::min(event.compute_begin + computed, event.end);
  }
  event.id = sent.id, event.device = device_, event.layer = sent.layer, event.peer = peer;
  event.rows = sent.rows, event.outcome = outcome, event.bytes = sent.bytes;
  trace->Add(event);
}

bool Caller::Usable(int peer) const {
  const Line& line = lines_[peer];
  return line.channel && !line.channel->closed() && !line.suspect;
}

void Caller::Run(const LayerRows& rows, float* y, bool* failed) {
  const CallSpec& spec = server_.spec();
  const int64_t d = spec.wire.d;
  step_ = server_.step(), layer_ = rows.layer;
  table_ = server_.table();
  Trace* const trace = server_.trace();
  const int64_t entered = trace ? NowNs() : 0;
  x_.resize(rows.t * d);
  for (int64_t t = 0; t < rows.t; ++t) spec.wire.Round(rows.x + t * d, &x_[t * d]);
  std::fill(failed, failed + rows.t, false);

  std::vector<int32_t> local(rows.t * rows.k, -1);
  std::vector<Pair> missing;
  for (int64_t t = 0; t < rows.t; ++t) {
    if (!rows.valid[t]) continue;
    for (int64_t a = t * rows.k; a < (t + 1) * rows.k; ++a) {
      const int32_t expert = rows.expert[a];
      if (expert < 0 || expert >= spec.experts) {
        failed[t] = true;
      } else if (table_->Holders(layer_, expert)[spec.rank]) {
        local[a] = expert;
      } else {
        missing.push_back(
            {static_cast<int32_t>(t), static_cast<uint16_t>(expert), rows.weight[a]});
      }
    }
  }
  parts_.clear();
  Adopt();
  // Late answers to earlier calls: whoever has sent all of them is asked again.
  Poll(0);
  const std::vector<Part*> first = Place(missing, Ranks(), 0);
  const int64_t begin = NowNs();
  RunLocal(rows, local, y, failed);
  const int64_t computed = NowNs();
  Wait(first);
  const int64_t end = NowNs();
  server_.Sum([&](CallSums& sums) {
    ++sums.layers;
    sums.local_s += 1e-9 * (computed - begin);
    sums.waited_s += 1e-9 * (end - computed);
  });
  for (const Part* part : first) Add(*part, y, failed);
  if (trace == nullptr) return;
  TraceEvent event{.begin = entered, .end = end, .compute_begin = begin, .compute_end = computed};
  event.step = step_, event.device = device_, event.layer = layer_, event.rows = rows.t;
  trace->Add(event);
}

std::vector<Caller::Part*> Caller::Place(const std::vector<Pair>& pairs, const Ranks& asked,
                                         int64_t patience_ns) {
  const int servers = server_.spec().servers;
  Ranks usable;
  for (int n = 0; n < servers; ++n) usable[n] = Usable(n) && !asked[n];
  std::map<int, Part*> by_peer;
  std::vector<Ranks> holders;
  for (size_t begin = 0, end; begin < pairs.size(); begin = end) {
    const int32_t row = pairs[begin].row;
    holders.clear();
    for (end = begin; end < pairs.size() && pairs[end].row == row; ++end) {
      holders.push_back(table_->Holders(layer_, pairs[end].expert) & usable);
    }
    const std::vector<int> chosen = ChooseServers(holders, servers);
    for (size_t i = begin; i < end; ++i) {
      Part*& part = by_peer[chosen[i - begin]];
      if (part == nullptr) part = &parts_.emplace_back();
      part->pairs.push_back(pairs[i]);
      if (part->rows.empty() || part->rows.back() != row) part->rows.push_back(row);
    }
  }
  std::vector<Part*> placed;
  for (auto& [peer, part] : by_peer) {
    part->peer = peer, part->version = table_->version, part->asked = asked;
    placed.push_back(part);
    if (peer >= 0) {
      Send(*part);
    } else if (patience_ns > 0) {
      part->state = Part::kNowhere;
      part->fail_at = NowNs() + patience_ns;
    } else {
      part->state = Part::kFailed;
    }
  }
  return placed;
}

void Caller::Send(Part& part) {
  const CallSpec& spec = server_.spec();
  CallHead head;
  head.layer = static_cast<uint16_t>(layer_), head.id = part.id = next_id_++, head.step = step_;
  head.rows = part.rows.size(), head.pairs = part.pairs.size();
  std::vector<char> message(sizeof(head) + head.BodyBytes(spec.wire), 0);
  char* to = message.data();
  auto put = [&](const void* from, size_t bytes) {
    std::memcpy(to, from, bytes);
    to += bytes;
  };
  put(&head, sizeof(head));
  auto* counts = reinterpret_cast<uint8_t*>(to);
  size_t place = 0;
  for (const Pair& pair : part.pairs) {
    while (part.rows[place] != pair.row) ++place;
    ++counts[place];
  }
  to += head.rows;
  for (const Pair& pair : part.pairs) put(&pair.expert, sizeof(pair.expert));
  for (const Pair& pair : part.pairs) put(&pair.weight, sizeof(pair.weight));
  for (const int32_t row : part.rows) {
    spec.wire.Encode(&x_[row * spec.wire.d], to);
    to += spec.wire.RowBytes();
  }
  const size_t bytes = message.size() + head.rows * spec.wire.d * sizeof(float);
  Line& line = lines_[part.peer];
  const int64_t now = NowNs();
  const double expected_ns = 1e9 * line.pace.Expected(bytes);
  part.repeat_at = now + std::max<int64_t>(spec.repeat_ns, kLate * expected_ns);
  part.fail_at = now + std::max<int64_t>(spec.fail_ns, kFailed * expected_ns);
  const auto rows = static_cast<int32_t>(head.rows);
  line.unanswered.push_back({part.id, now, bytes, step_, layer_, rows});
  server_.Count(part.peer, PeerCounters::kCalls, 1);
  server_.Count(part.peer, PeerCounters::kRows, head.rows);
  server_.Count(part.peer, PeerCounters::kBytesSent, message.size());
  server_.CountRows(layer_, part.peer, head.rows);
  line.channel->Send(std::move(message));
}

void Caller::RunLocal(const LayerRows& rows, const std::vector<int32_t>& local, float* y,
                      bool* failed) {
  std::vector<int32_t> wanted(local);
  std::sort(wanted.begin(), wanted.end());
  wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
  if (!wanted.empty() && wanted.front() < 0) wanted.erase(wanted.begin());
  const auto held = server_.Find(layer_, wanted);
  std::vector<int32_t> numbers(local.size(), -1);
  for (size_t a = 0; a < local.size(); ++a) {
    if (local[a] < 0) continue;
    numbers[a] = std::lower_bound(wanted.begin(), wanted.end(), local[a]) - wanted.begin();
    // A table never names what is not here; a row must not lose an expert in silence if one does.
    if (!held[numbers[a]]) failed[a / rows.k] = true;
  }
  server_.Compute(held, {x_.data(), numbers.data(), rows.weight, rows.t, rows.k}, y);
}

void Caller::Wait(const std::vector<Part*>& first) {
  while (true) {
    const int64_t now = NowNs();
    for (size_t i = 0; i < parts_.size(); ++i) Review(parts_[i], now);
    if (std::all_of(first.begin(), first.end(), [](const Part* part) { return Resolved(*part); })) {
      return;
    }
    Poll(NextLook());
    Adopt();
  }
}

bool Caller::Succeeded(const Part& part) {
  if (part.state == Part::kAnswered) return true;
  return !part.instead.empty() && std::all_of(part.instead.begin(), part.instead.end(),
                                              [](const Part* other) { return Succeeded(*other); });
}

bool Caller::Resolved(const Part& part) {
  if (part.state == Part::kFailed || Succeeded(part)) return true;
  return part.state == Part::kLost &&
         std::all_of(part.instead.begin(), part.instead.end(),
                     [](const Part* other) { return Resolved(*other); });
}

void Caller::Review(Part& part, int64_t now) {
  if (part.state == Part::kWaiting) {
    if (lines_[part.peer].channel->closed()) {
      server_.Count(part.peer, PeerCounters::kLost, 1);
      Lose(part.peer);
      // Nobody is waited for who may never come back.
      Replace(part, 0);
    } else if (now >= part.fail_at) {
      lines_[part.peer].suspect = true;
      for (const Sent& sent : lines_[part.peer].unanswered) {
        if (sent.id == part.id) Record(part.peer, sent, TraceEvent::kLate, AnswerHead());
      }
      part.state = part.instead.empty() ? Part::kFailed : Part::kLost;
    } else if (now >= part.repeat_at && !part.repeated) {
      Repeat(part);
    }
  } else if (part.state == Part::kNowhere) {
    const auto newer = server_.table();
    if (newer->version != part.version) {
      table_ = newer;
      Replace(part, part.fail_at - now);
    } else if (now >= part.fail_at) {
      part.state = Part::kFailed;
    }
  }
}

// Asks others, as this one will not answer; by a newer table perhaps this one again, for what it still has.
void Caller::Replace(Part& part, int64_t patience_ns) {
  Ranks asked;
  if (part.version == table_->version) {
    asked = part.asked;
    if (part.peer >= 0) asked.set(part.peer);
  }
  part.state = Part::kLost;
  if (part.instead.empty()) part.instead = Place(part.pairs, asked, patience_ns);
}

// Asks others too, where all that is wanted has other holders.
void Caller::Repeat(Part& part) {
  part.repeated = true;
  lines_[part.peer].suspect = true;
  const int servers = server_.spec().servers;
  for (const Pair& pair : part.pairs) {
    bool other = false;
    for (int n = 0; n < servers && !other; ++n) {
      other = table_->Holders(layer_, pair.expert)[n] && Usable(n) && !part.asked[n];
    }
    if (!other) return;
  }
  server_.Count(part.peer, PeerCounters::kRepeats, 1);
  Ranks asked = part.asked;
  asked.set(part.peer);
  part.instead = Place(part.pairs, asked, 0);
}

int64_t Caller::NextLook() const {
  const int64_t now = NowNs();
  int64_t until = now + kLookSeldomNs;
  for (const Part& part : parts_) {
    if (part.state == Part::kNowhere) until = std::min(until, now + kLookNs);
    if (part.state != Part::kWaiting) continue;
    until = std::min(until, part.repeated ? part.fail_at : part.repeat_at);
  }
  return until;
}

void Caller::Poll(int64_t until) {
  std::vector<pollfd> polled;
  std::vector<int> peers;
  for (size_t n = 0; n < lines_.size(); ++n) {
    const Line& line = lines_[n];
    if (!line.channel || line.channel->closed() || line.unanswered.empty()) continue;
    polled.push_back({line.channel->fd(), line.channel->Events(true), 0});
    peers.push_back(static_cast<int>(n));
  }
  const int64_t ms = (std::max<int64_t>(until - NowNs(), 0) + 999'999) / 1'000'000;
  if (polled.empty() && ms == 0) return;
  if (poll(polled.data(), polled.size(), static_cast<int>(ms)) <= 0) return;
  for (size_t i = 0; i < polled.size(); ++i) {
    if (polled[i].revents & POLLOUT) lines_[peers[i]].channel->Flush();
    if (polled[i].revents & ~POLLOUT) Read(peers[i]);
  }
}

void Caller::Read(int peer) {
  const CallSpec& spec = server_.spec();
  lines_[peer].channel->Read<AnswerHead>(
      spec.wire, spec.most_rows,
      [&](const AnswerHead& head, const char* sums) { Answered(peer, head, sums); });
}

void Caller::Answered(int peer, const AnswerHead& head, const char* sums) {
  Line& line = lines_[peer];
  const auto sent = std::find_if(line.unanswered.begin(), line.unanswered.end(),
                                 [&](const Sent& each) { return each.id == head.id; });
  if (sent == line.unanswered.end()) return;
  const int64_t waited_ns = NowNs() - sent->at;
  server_.Count(peer, PeerCounters::kWaitedNs, waited_ns);
  server_.Count(peer, PeerCounters::kBytesReceived,
                sizeof(head) + head.BodyBytes(server_.spec().wire));
  if (head.status == Status::kDone) {
    line.pace.Learn(sent->bytes, 1e-9 * waited_ns);
    const double b = sent->bytes;
    const double s = 1e-9 * waited_ns - 1e-6 * (head.queued_us + head.computed_us);
    server_.Sum([&](CallSums& sums) {
      ++sums.answers;
      sums.s += s, sums.bytes += b, sums.bytes_bytes += b * b, sums.bytes_s += b * s, sums.s_s += s * s;
    });
  }
  const bool done = head.status == Status::kDone;
  Record(peer, *sent, done ? TraceEvent::kAnswered : TraceEvent::kRefused, head);
  line.unanswered.erase(sent);
  if (line.unanswered.empty()) line.suspect = false;
  for (size_t i = 0; i < parts_.size(); ++i) {
    Part& part = parts_[i];
    if (part.id != head.id || part.peer != peer || part.state != Part::kWaiting) continue;
    if (head.status != Status::kDone || head.rows != part.rows.size()) {
      server_.Count(peer, PeerCounters::kRefusals, 1);
      table_ = server_.table();
      Replace(part, kPatienceNs);
      return;
    }
    part.sums.resize(head.rows * server_.spec().wire.d);
    std::memcpy(part.sums.data(), sums, part.sums.size() * sizeof(float));
    part.state = Part::kAnswered;
    return;
  }
}

void Caller::Add(const Part& part, float* y, bool* failed) const {
  if (part.state != Part::kAnswered) {
    for (const Part* other : part.instead) Add(*other, y, failed);
    if (!part.instead.empty()) return;
    CountFailed(part);
    for (const int32_t row : part.rows) failed[row] = true;
    return;
  }
  const int64_t d = server_.spec().wire.d;
  for (size_t r = 0; r < part.rows.size(); ++r) {
    ForThisProcessor().add(1.0f, &part.sums[r * d], y + part.rows[r] * d, d);
  }
}

void Caller::CountFailed(const Part& part) const {
  for (size_t begin = 0, end; begin < part.pairs.size(); begin = end) {
    Ranks holders;
    const int32_t row = part.pairs[begin].row;
    for (end = begin; end < part.pairs.size() && part.pairs[end].row == row; ++end) {
      holders |= table_->Holders(layer_, part.pairs[end].expert);
    }
    for (int n = 0; n < server_.spec().servers; ++n) {
      if (holders[n]) server_.Count(n, PeerCounters::kFailedRows, 1);
    }
  }
}

}  // namespace dance

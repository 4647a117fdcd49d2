#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "calls.h"

namespace dance {
namespace {

// A call is late after kLate times its expected duration, and fails after kFailed times.
constexpr double kLate = 3, kFailed = 10;
// How long pairs that were refused wait for a table that names another holder.
constexpr int64_t kPatienceNs = 500'000'000;
// How often `Wait` looks for new tables and connections: with and without pairs that have no holder.
constexpr int64_t kLookNs = 5'000'000, kLookSeldomNs = 100'000'000;
// Weight of the latest answer in a pace; answers of at most kSmall bytes measure the base time.
constexpr double kLearn = 0.2;
constexpr size_t kSmall = 8192;
// Minimum size of a group in bytes of rows, if the rows fill more than one group.
constexpr size_t kGroupBytes = 64 * 1024;
// Bits of a call's id below the device number.
constexpr int kCallBits = 48;

}  // namespace

std::vector<int> ChooseServers(const std::vector<Ranks>& holders, const std::vector<int>& order) {
  std::vector<int> found(holders.size(), -1);
  while (true) {
    int best = -1, most = 0;
    for (const int server : order) {
      int held = 0;
      for (size_t k = 0; k < holders.size(); ++k) held += found[k] < 0 && holders[k][server];
      if (held > most) best = server, most = held;
    }
    if (best < 0) return found;
    for (size_t k = 0; k < holders.size(); ++k) {
      if (found[k] < 0 && holders[k][best]) found[k] = best;
    }
  }
}

void Caller::Pace::Learn(size_t bytes, double s) {
  // The cap keeps one long stall from making a server look slow afterwards.
  s = std::min(s, kFailed * Expected(bytes));
  if (bytes <= kSmall) {
    base_s += kLearn * (s - base_s);
  } else {
    byte_s += kLearn * (std::max(0.0, s - base_s) / bytes - byte_s);
  }
}

// The device number in the ids makes the ids of all devices distinct.
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
    Forget(peer);
    line.channel = std::make_unique<Channel>(fd);
    line.suspect = false;
    // Parts that were sent on the old connection get no answer.
    for (size_t i = 0; i < parts_.size(); ++i) {
      const Part& part = parts_[i];
      const bool sent = part.state == Part::kWaiting && part.id != 0;
      if (sent && part.peer == peer) Lose(parts_[i]);
    }
  }
  dialled_.clear();
}

void Caller::Forget(int peer) {
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

Ranks Caller::Usable() const {
  Ranks usable;
  if (server_.cancelled()) return usable;
  usable.set(server_.spec().rank);
  for (size_t n = 0; n < lines_.size(); ++n) {
    const Line& line = lines_[n];
    if (line.channel && !line.channel->closed() && !line.suspect) usable.set(n);
  }
  return usable;
}

Ranks Caller::Holders(uint16_t expert, const Ranks& usable, int64_t version) const {
  const auto newer = std::find_if(tables_->begin(), tables_->end(),
                                  [&](const auto& table) { return table->version > version; });
  Ranks found;
  for (auto table = newer; table != tables_->begin() && found.none();) {
    found = (*--table)->Holders(layer_, expert) & usable;
  }
  for (auto table = newer; table != tables_->end() && found.none(); ++table) {
    found = (*table)->Holders(layer_, expert) & usable;
  }
  return found;
}

void Caller::Start(const LayerRows& rows, int64_t first) {
  const CallSpec& spec = server_.spec();
  const int64_t d = spec.wire.d, count = rows.t * rows.k;
  if (first == 0) {
    step_ = server_.step(), layer_ = rows.layer;
    tables_ = server_.tables();
    parts_.clear(), groups_.clear();
  }
  x_.resize((first + rows.t) * d);
  spec.wire.Round(rows.x, rows.t * d, &x_[first * d]);
  Group& group = groups_.emplace_back(Group{first, rows.t, rows.k});
  group.failed.resize(rows.t);
  group.local.resize(count, -1);
  group.weights.resize(count);
  spec.wire.Round(rows.weight, count, group.weights.data());

  const Table& table = *tables_->front();
  auto known = [&](int64_t a) {
    return rows.valid[a / rows.k] && rows.expert[a] >= 0 && rows.expert[a] < spec.experts;
  };
  std::vector<int32_t> wanted;
  for (int64_t a = 0; a < count; ++a) {
    const bool local = known(a) && table.Holders(layer_, rows.expert[a])[spec.rank];
    if (local) wanted.push_back(rows.expert[a]);
  }
  group.held = server_.Find(layer_, wanted);
  std::vector<Pair> missing;
  for (int64_t a = 0; a < count; ++a) {
    const int64_t row = a / rows.k;
    const int32_t expert = rows.expert[a];
    if (!known(a)) {
      group.failed[row] |= rows.valid[row];
      continue;
    }
    if (table.Holders(layer_, expert)[spec.rank]) group.local[a] = group.held.Place(expert);
    if (group.local[a] < 0) {
      const auto place = static_cast<int32_t>(first + row);
      missing.push_back({place, static_cast<uint16_t>(expert), group.weights[a]});
    }
  }
  Adopt();
  // Reads late answers to earlier calls, so that servers that have answered everything are asked again.
  Poll(0);
  group.parts = Place(missing, Ranks(), table.version, 0);
  CountAway(group);
}

void Caller::CountAway(const Group& group) const {
  std::vector<char> away(group.t);
  for (const Part* part : group.parts) {
    if (part->peer < 0 || part->peer == server_.spec().rank) continue;
    for (const int32_t row : part->rows) away[row - group.first] = 1;
  }
  const int64_t rows = std::count(away.begin(), away.end(), 1);
  if (rows > 0) server_.CountAway(step_, layer_, rows);
}

bool Caller::Finish(int64_t first, float* y, bool* failed) {
  const auto found = std::find_if(groups_.begin(), groups_.end(),
                                  [&](const Group& group) { return group.first == first; });
  if (found == groups_.end()) return false;
  const Group& group = *found;
  const float* const x = &x_[first * server_.spec().wire.d];
  const int64_t begin = NowNs();
  const Assignments own{x, group.local.data(), group.weights.data(), group.t, group.k};
  server_.Compute(group.held, own, y);
  const int64_t computed = NowNs();
  Wait(group.parts);
  const int64_t end = NowNs();
  server_.Sum([&](CallSums& sums) {
    sums.layers += first == 0;
    sums.local_s += 1e-9 * (computed - begin);
    sums.waited_s += 1e-9 * (end - computed);
  });
  std::copy(group.failed.begin(), group.failed.end(), failed);
  for (const Part* part : group.parts) Add(*part, first, y, failed);
  if (Trace* const trace = server_.trace()) {
    TraceEvent event{.begin = begin, .end = end, .compute_begin = begin, .compute_end = computed};
    event.step = step_, event.device = device_, event.layer = layer_, event.rows = group.t;
    trace->Add(event);
  }
  return true;
}

// Splits a server's pairs into groups of whole rows: while the server computes one group, others are on
// the wire in both directions.
std::vector<std::vector<Caller::Pair>> Caller::Groups(const std::vector<Pair>& pairs) const {
  size_t rows = 0;
  for (size_t i = 0; i < pairs.size(); ++i) rows += i == 0 || pairs[i].row != pairs[i - 1].row;
  const size_t least = kGroupBytes / server_.spec().wire.RowBytes() + 1;
  const size_t most = std::max((rows + kMostGroups - 1) / kMostGroups, least);
  std::vector<std::vector<Pair>> groups;
  size_t left = 0;  // rows until the group is full
  for (size_t i = 0; i < pairs.size(); ++i) {
    if (i == 0 || pairs[i].row != pairs[i - 1].row) {
      if (left == 0) groups.emplace_back(), left = most;
      --left;
    }
    groups.back().push_back(pairs[i]);
  }
  return groups;
}

std::vector<Caller::Part*> Caller::Place(const std::vector<Pair>& pairs, const Ranks& asked,
                                         int64_t version, int64_t patience_ns) {
  const Ranks usable = Usable() & ~asked;
  std::map<int, std::vector<Pair>> by_peer;
  std::vector<Ranks> holders;
  for (size_t begin = 0, end; begin < pairs.size(); begin = end) {
    holders.clear();
    for (end = begin; end < pairs.size() && pairs[end].row == pairs[begin].row; ++end) {
      holders.push_back(Holders(pairs[end].expert, usable, version));
    }
    const std::vector<int> chosen = ChooseServers(holders, server_.spec().order);
    for (size_t i = begin; i < end; ++i) by_peer[chosen[i - begin]].push_back(pairs[i]);
  }
  std::vector<Part*> placed;
  for (const auto& [peer, all] : by_peer) {
    const bool goes = peer >= 0 && peer != server_.spec().rank;
    for (const auto& own : goes ? Groups(all) : std::vector<std::vector<Pair>>{all}) {
      Part& part = *placed.emplace_back(&parts_.emplace_back());
      part.peer = peer, part.pairs = own, part.tables = tables_, part.asked = asked;
      for (const Pair& pair : own) {
        if (part.rows.empty() || part.rows.back() != pair.row) part.rows.push_back(pair.row);
      }
      if (goes) {
        Send(part);
      } else if (peer >= 0) {
        ComputeHere(part);
      } else if (patience_ns > 0) {
        part.state = Part::kNowhere;
        part.fail_at = NowNs() + patience_ns;
      } else {
        part.state = Part::kFailed;
      }
    }
  }
  return placed;
}

// For pairs that a table places on this server: a staged table that is not in force yet, or a table
// that names an expert that is not here.
void Caller::ComputeHere(Part& part) {
  const int64_t d = server_.spec().wire.d;
  const auto rows = static_cast<int64_t>(part.rows.size());
  std::vector<int32_t> wanted;
  std::map<int32_t, int64_t> pairs_of;
  int64_t k = 0;
  for (const Pair& pair : part.pairs) {
    wanted.push_back(pair.expert);
    k = std::max(k, ++pairs_of[pair.row]);
  }
  const Held held = server_.Find(layer_, wanted);
  std::vector<float> x(rows * d), weights(rows * k);
  std::vector<int32_t> places(rows * k, -1);
  std::vector<Pair> missing;
  auto pair = part.pairs.begin();
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(&x_[part.rows[r] * d], d, &x[r * d]);
    for (int64_t a = r * k; pair != part.pairs.end() && pair->row == part.rows[r]; ++a, ++pair) {
      places[a] = held.Place(pair->expert), weights[a] = pair->weight;
      if (places[a] < 0) missing.push_back(*pair);
    }
  }
  part.sums.resize(rows * d);
  server_.Compute(held, {x.data(), places.data(), weights.data(), rows, k}, part.sums.data());
  Replace(part, missing, tables_->front()->version, kPatienceNs);
}

void Caller::Send(Part& part) {
  const CallSpec& spec = server_.spec();
  CallHead head;
  head.layer = static_cast<uint16_t>(layer_), head.step = step_;
  head.rows = part.rows.size(), head.pairs = part.pairs.size();
  const size_t size = sizeof(head) + head.BodyBytes(spec.wire);
  const size_t bytes = size + head.rows * spec.wire.d * sizeof(float);
  Line& line = lines_[part.peer];
  const int64_t now = NowNs();
  size_t queued = bytes;
  for (const Sent& sent : line.unanswered) queued += sent.bytes;
  const double expected_ns = 1e9 * line.pace.Expected(queued);
  part.repeat_at = now + std::max<int64_t>(spec.repeat_ns, kLate * expected_ns);
  part.fail_at = now + std::max<int64_t>(spec.fail_ns, kFailed * expected_ns);
  if (line.unanswered.size() >= kMostUnanswered) return;
  head.id = part.id = next_id_++;
  std::vector<char> message(size, 0);
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
  for (const Pair& pair : part.pairs) put(&pair.expert, spec.wire.NumberBytes());
  for (const Pair& pair : part.pairs) {
    spec.wire.EncodeWeight(pair.weight, to);
    to += spec.wire.WeightBytes();
  }
  for (const int32_t row : part.rows) {
    spec.wire.Encode(&x_[row * spec.wire.d], to);
    to += spec.wire.RowBytes();
  }
  const auto rows = static_cast<int32_t>(head.rows);
  line.unanswered.push_back({part.id, now, bytes, queued, step_, layer_, rows});
  server_.Count(part.peer, PeerCounters::kCalls, 1);
  server_.Count(part.peer, PeerCounters::kRows, head.rows);
  server_.Count(part.peer, PeerCounters::kBytesSent, message.size());
  server_.CountRows(layer_, part.peer, head.rows);
  line.channel->Send(std::move(message));
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
  auto all = [](const std::vector<Part*>& parts) {
    return std::all_of(parts.begin(), parts.end(), [](const Part* each) { return Succeeded(*each); });
  };
  if (part.state == Part::kDone && all(part.rest)) return true;
  return !part.instead.empty() && all(part.instead);
}

bool Caller::Resolved(const Part& part) {
  auto all = [](const std::vector<Part*>& parts) {
    return std::all_of(parts.begin(), parts.end(), [](const Part* each) { return Resolved(*each); });
  };
  if (part.state == Part::kFailed || Succeeded(part)) return true;
  return (part.state == Part::kDone || part.state == Part::kLost) && all(part.rest) &&
         all(part.instead);
}

void Caller::Review(Part& part, int64_t now) {
  const bool waiting = part.state == Part::kWaiting;
  if (server_.cancelled() && (waiting || part.state == Part::kNowhere)) {
    part.state = Part::kFailed;
  } else if (waiting) {
    Line& line = lines_[part.peer];
    if (line.channel->closed()) Forget(part.peer);
    if (line.channel->closed() || (part.id == 0 && line.suspect)) {
      // Do not wait: the peer may never come back.
      Lose(part);
    } else if (now >= part.fail_at) {
      line.suspect = true;
      for (const Sent& sent : line.unanswered) {
        if (sent.id == part.id) Record(part.peer, sent, TraceEvent::kLate, AnswerHead());
      }
      part.state = part.instead.empty() ? Part::kFailed : Part::kLost;
    } else if (part.id == 0) {
      if (line.unanswered.size() < kMostUnanswered) Send(part);
    } else if (now >= part.repeat_at && !part.repeated) {
      Repeat(part);
    }
  } else if (part.state == Part::kNowhere) {
    if (server_.tables() != part.tables) {
      Replace(part, part.pairs, tables_->front()->version, part.fail_at - now);
    } else if (now >= part.fail_at) {
      part.state = Part::kFailed;
    }
  }
}

void Caller::Replace(Part& part, const std::vector<Pair>& missing, int64_t version,
                     int64_t patience_ns) {
  part.state = Part::kDone;
  if (missing.size() == part.pairs.size()) part.rows.clear();
  if (missing.empty()) return;
  tables_ = server_.tables();
  Ranks asked;
    // A part without a peer found no holder. Any server may have loaded the experts since; newer tables
    // name it.
  if (part.peer >= 0) asked = Ranks(part.asked).set(part.peer);
  part.rest = Place(missing, asked, version, patience_ns);
}

void Caller::Lose(Part& part) {
  if (part.id != 0) server_.Count(part.peer, PeerCounters::kLost, 1);
  if (part.instead.empty()) {
    Replace(part, part.pairs, tables_->front()->version, 0);
  } else {
    part.state = Part::kLost;
  }
}

// Also asks other servers, if all experts of the part have other holders.
void Caller::Repeat(Part& part) {
  part.repeated = true;
  lines_[part.peer].suspect = true;
  Ranks asked = part.asked;
  asked.set(part.peer);
  const Ranks usable = Usable() & ~asked;
  const int64_t version = tables_->front()->version;
  for (const Pair& pair : part.pairs) {
    if (Holders(pair.expert, usable, version).none()) return;
  }
  server_.Count(part.peer, PeerCounters::kRepeats, 1);
  part.instead = Place(part.pairs, asked, version, 0);
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
  server_.Beat();
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
      spec.wire, spec.most_rows, [&](const AnswerHead& head, const char* body) {
        Answered(peer, head, body);
        return true;
      });
}

void Caller::Answered(int peer, const AnswerHead& head, const char* body) {
  Line& line = lines_[peer];
  const auto sent = std::find_if(line.unanswered.begin(), line.unanswered.end(),
                                 [&](const Sent& each) { return each.id == head.id; });
  if (sent == line.unanswered.end()) return;
  const int64_t waited_ns = NowNs() - sent->at;
  server_.Count(peer, PeerCounters::kWaitedNs, waited_ns);
  server_.Count(peer, PeerCounters::kBytesReceived,
                sizeof(head) + head.BodyBytes(server_.spec().wire));
  if (head.status == Status::kDone) {
    line.pace.Learn(sent->queued, 1e-9 * waited_ns);
    const double b = sent->queued;
    const double s = 1e-9 * waited_ns - 1e-6 * (head.queued_us + head.computed_us);
    server_.Sum([&](CallSums& sums) {
      ++sums.answers;
      sums.s += s, sums.bytes += b, sums.bytes_bytes += b * b, sums.bytes_s += b * s, sums.s_s += s * s;
    });
  }
  const bool done = head.status == Status::kDone && head.missing == 0;
  Record(peer, *sent, done ? TraceEvent::kAnswered : TraceEvent::kRefused, head);
  line.unanswered.erase(sent);
  if (line.unanswered.empty()) line.suspect = false;
  for (size_t i = 0; i < parts_.size(); ++i) {
    Part& part = parts_[i];
    if (part.id != head.id || part.peer != peer || part.state != Part::kWaiting) continue;
    TakeAnswer(part, head, body);
    return;
  }
}

void Caller::TakeAnswer(Part& part, const AnswerHead& head, const char* body) {
  std::vector<Pair> missing = part.pairs;
  if (head.status == Status::kDone && head.rows == part.rows.size()) {
    const size_t bytes = head.rows * server_.spec().wire.d * sizeof(float);
    part.sums.resize(bytes / sizeof(float));
    std::memcpy(part.sums.data(), body, bytes);
    std::vector<uint16_t> experts(head.missing);
    std::memcpy(experts.data(), body + bytes, head.missing * sizeof(uint16_t));
    std::erase_if(missing, [&](const Pair& pair) {
      return std::find(experts.begin(), experts.end(), pair.expert) == experts.end();
    });
  }
  if (!missing.empty()) server_.Count(part.peer, PeerCounters::kRefusals, 1);
  Replace(part, missing, head.version, kPatienceNs);
}

void Caller::Add(const Part& part, int64_t first, float* y, bool* failed) const {
  auto add = [&](const std::vector<Part*>& parts) {
    for (const Part* each : parts) Add(*each, first, y, failed);
  };
  const bool answered =
      part.state == Part::kDone &&
      std::all_of(part.rest.begin(), part.rest.end(), [](const Part* each) { return Succeeded(*each); });
  if (!part.instead.empty() && !answered) {
    add(part.instead);
    return;
  }
  add(part.rest);
  if (part.state != Part::kDone) {
    CountFailed(part);
    for (const int32_t row : part.rows) failed[row - first] = true;
    return;
  }
  const int64_t d = server_.spec().wire.d;
  for (size_t r = 0; r < part.rows.size(); ++r) {
    ForThisProcessor().add(1.0f, &part.sums[r * d], y + (part.rows[r] - first) * d, d);
  }
}

void Caller::CountFailed(const Part& part) const {
  for (size_t begin = 0, end; begin < part.pairs.size(); begin = end) {
    Ranks holders;
    const int32_t row = part.pairs[begin].row;
    for (end = begin; end < part.pairs.size() && part.pairs[end].row == row; ++end) {
      holders |= tables_->front()->Holders(layer_, part.pairs[end].expert);
    }
    for (int n = 0; n < server_.spec().servers; ++n) {
      if (holders[n]) server_.Count(n, PeerCounters::kFailedRows, 1);
    }
  }
}

}  // namespace dance

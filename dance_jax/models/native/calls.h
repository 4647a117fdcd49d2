// Expert calls between servers that step on their own: a server's tokens at experts that others hold,
// and the others' at its own.
//
// A call names experts, never slots, and asks for one sum of each row; it is pure, so it may be repeated
// and answered by any holder. Every device of a server has a connection of its own to every other server
// for its calls (`Caller`); those of the others are answered by one thread (`Answerer`), which makes no
// call and waits for no step. So no two servers can wait for each other.

#pragma once

#include <array>
#include <atomic>
#include <bitset>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "experts.h"
#include "trace.h"
#include "wire.h"

namespace dance {

constexpr int kMaxServers = 256;
// A set of servers.
using Ranks = std::bitset<kMaxServers>;

// Who holds which expert, by one version of the placement.
struct Table {
  int64_t version;
  int64_t experts;            // of a layer
  std::vector<Ranks> holders;  // [layers * experts]

  const Ranks& Holders(int64_t layer, int64_t expert) const {
    return holders[layer * experts + expert];
  }
};

// What a server knows of the placement: the table in force, then those of the batches that it has
// loaded and that may be in force elsewhere, in their order.
using Tables = std::vector<std::shared_ptr<const Table>>;

// Experts of a layer, as far as they are on this server.
struct Held {
  std::vector<int32_t> experts;  // ascending
  std::vector<ExpertPool::Holding> holdings;  // null: it is not here

  // An expert's place; -1: it is not here.
  int32_t Place(int32_t expert) const;
};

// Groups of a layer's rows that go to a server one by one, each as a call.
constexpr size_t kMostGroups = 4;
// Calls of one caller that a callee has not answered: one of each group, and a repeat of another's.
constexpr size_t kMostUnanswered = kMostGroups + 1;

// The server that is asked for each of a row's experts, -1 where nobody holds it: that with most of
// them, then that with most of the others, as placement/visit.py has it. holders [k]; order: all servers, as the caller prefers
// to call them.
std::vector<int> ChooseServers(const std::vector<Ranks>& holders, const std::vector<int>& order);

// What a server counts of a peer; all grow. As models/counters.py has it.
struct PeerCounters {
  enum Name {
    kCalls,          // to it, repeats included
    kRows,           // in them
    kBytesSent,      // of calls to it and of answers to its own
    kBytesReceived,
    kRepeats,        // calls that went elsewhere as well, because its answer was late
    kRefusals,       // calls of which it had not all experts
    kLost,           // calls that its connection ended
    kFailedRows,     // rows that have failed for want of an expert that it holds
    kWaitedNs,       // from sending to the answer's arrival
    kAnswered,       // its calls that were answered here
    kAnsweredRows,
    kQueuedNs,       // that they waited for their turn
    kCount
  };
  std::array<std::atomic<int64_t>, kCount> value{};
};

// How long things took, as they add up over all calls and layers.
struct CallSums {
  double layers = 0, local_s = 0, waited_s = 0;  // of own steps: layers run, experts here, answers
  // Layers of own steps of which any row has calls that leave this server, once in a step; these rows.
  double layers_waited = 0, rows_away = 0;
  double served_s = 0, served_batches = 0;       // of the others' calls, several in one go perhaps
  // Of answers: their number, seconds on the way, bytes there and back, and the products of these, for
  // the line of seconds over bytes.
  double answers = 0, s = 0, bytes = 0, bytes_bytes = 0, bytes_s = 0, s_s = 0;
};

struct CallSpec {
  int rank, servers;
  int64_t layers, experts;  // experts of each layer
  Wire wire;
  uint32_t most_rows;  // of a call
  // A call that is not answered for so long is sent to another holder as well; for so long, fails. Both
  // are longer where calls are expected to take long.
  int64_t repeat_ns, fail_ns;
  std::vector<int> order;  // all servers, as this one prefers to call them
};

class CallServer;

// Rows of a layer on one device: all, or a group of them.
struct LayerRows {
  int64_t layer;
  const float* x;         // [t, d]
  const int32_t* expert;  // [t, k]
  const float* weight;    // [t, k]
  const bool* valid;      // [t], false: the row is routed nowhere
  int64_t t, k;
};

// The calls of one device's steps. One thread at a time runs a layer; it may be another each time.
class Caller {
 public:
  Caller(CallServer& server, int64_t device);
  ~Caller();

  // Takes over a connection to a peer, in place of the one before; from any thread.
  void Dial(int peer, int fd);
  // Sends calls for a group of a layer's rows, of which `first` come before it; the first group of all
  // begins the layer.
  void Start(const LayerRows& rows, int64_t first);
  // y [t, d] = the weighted sums of the experts of each row of that group, wherever they are: computes
  // those that are here, and waits for the others. A row of which some are nowhere to be had has
  // failed, and its sum is anything. False: no such group was started.
  bool Finish(int64_t first, float* y, bool* failed);

 private:
  struct Pair {
    int32_t row;
    uint16_t expert;
    float weight;
  };
  // What is asked of one server.
  struct Part {
    // Done: its sums are those of all its experts but for what `rest` asks others for.
    enum State { kWaiting, kDone, kLost, kNowhere, kFailed } state = kWaiting;
    int peer = -1;
    uint64_t id = 0;             // 0: it is not sent yet
    std::vector<Pair> pairs;     // row after row
    std::vector<int32_t> rows;
    std::shared_ptr<const Tables> tables;  // by which it was placed
    Ranks asked;                 // for the same before
    int64_t repeat_at = 0, fail_at = 0;
    bool repeated = false;
    std::vector<float> sums;     // [rows, d]
    std::vector<Part*> rest;
    std::vector<Part*> instead;  // parts that ask others for the same, as this one is late
  };
  // How long a peer's answers take.
  struct Pace {
    double base_s = 0.02, byte_s = 1e-6;

    double Expected(size_t bytes) const { return base_s + byte_s * bytes; }
    void Learn(size_t bytes, double s);
  };
  struct Sent {
    uint64_t id;
    int64_t at;
    size_t bytes;   // there and back
    size_t queued;  // with those of the calls before it that were not answered
    int64_t step, layer;
    int32_t rows;
  };
  // Rows whose calls were sent together.
  struct Group {
    int64_t first, t, k;
    Held held;                   // its experts that are here
    std::vector<int32_t> local;  // [t, k]: their places, or -1
    std::vector<float> weights;  // [t, k]
    std::vector<Part*> parts;    // for those that are not
    std::vector<char> failed;    // [t]
  };
  struct Line {
    std::unique_ptr<Channel> channel;
    std::vector<Sent> unanswered;
    // An answer is late: it is asked no more until all that it owes have come.
    bool suspect = false;
    Pace pace;
  };

  void Adopt();
  std::vector<std::vector<Pair>> Groups(const std::vector<Pair>& pairs) const;
  // Servers that may be asked, this one among them.
  Ranks Usable() const;
  // Those of `usable` to ask for an expert: by the newest table that is no newer than `version`, or
  // else by the others, the next ones first.
  Ranks Holders(uint16_t expert, const Ranks& usable, int64_t version) const;
  // Parts for these pairs, which are sent, or computed here; none to servers in `asked`. What nobody
  // has is kNowhere until `patience_ns` have passed.
  std::vector<Part*> Place(const std::vector<Pair>& pairs, const Ranks& asked, int64_t version,
                           int64_t patience_ns);
  // Counts the rows of a group that have calls elsewhere.
  void CountAway(const Group& group) const;
  // Sends a part, or leaves it for when its server has answered another.
  void Send(Part& part);
  void ComputeHere(Part& part);
  void Wait(const std::vector<Part*>& first);
  void Review(Part& part, int64_t now);
  // Its connection has ended, and with it what was not answered.
  void Forget(int peer);
  // A part has an answer, its sums, but for these pairs, which go to others.
  void Replace(Part& part, const std::vector<Pair>& missing, int64_t version, int64_t patience_ns);
  // A part gets no answer.
  void Lose(Part& part);
  void Repeat(Part& part);
  // When a wait has to look at its parts again.
  int64_t NextLook() const;
  // Sends and reads what it can; where that is nothing, waits for it until then.
  void Poll(int64_t until);
  void Read(int peer);
  void Answered(int peer, const AnswerHead& head, const char* body);
  void TakeAnswer(Part& part, const AnswerHead& head, const char* body);
  void Record(int peer, const Sent& sent, TraceEvent::Outcome outcome, const AnswerHead& head) const;
  // y and failed are of the rows from `first` on.
  void Add(const Part& part, int64_t first, float* y, bool* failed) const;
  void CountFailed(const Part& part) const;
  static bool Succeeded(const Part& part);
  // There is no more to wait for.
  static bool Resolved(const Part& part);

  CallServer& server_;
  const int64_t device_;
  std::vector<Line> lines_;  // by rank
  std::mutex dialled_mutex_;
  std::vector<std::pair<int, int>> dialled_;  // (peer, fd)
  uint64_t next_id_;
  // Of the layer that runs.
  int64_t step_ = 0, layer_ = 0;
  std::vector<float> x_;  // of all groups so far
  std::shared_ptr<const Tables> tables_;
  std::deque<Part> parts_;
  std::deque<Group> groups_;
};

// Answers the others' calls, in a thread of its own.
class Answerer {
 public:
  explicit Answerer(CallServer& server);
  ~Answerer();

  // Takes over a connection on which a peer calls; from any thread.
  void Accept(int peer, int fd);

 private:
  struct Line {
    int peer;
    std::unique_ptr<Channel> channel;
    size_t waiting = 0;  // of its calls

    // So many calls are held for it; what it sends beyond waits in the connection.
    bool Reads() const { return waiting + channel->unsent() < kMostUnanswered; }
  };
  struct Call {
    // Kept, as the connection may end while the call waits for its turn.
    std::shared_ptr<Line> line;
    CallHead head;
    std::vector<char> body;
    int64_t arrived;
  };
  // A call's body, read; pairs are row after row.
  struct Content {
    // It may be computed. False: it is no call of this model.
    bool sane = false;
    // Anything of it is on this server, and which experts are not.
    bool here = false;
    std::vector<uint16_t> missing;
    const uint8_t* counts = nullptr;
    std::vector<uint16_t> experts;
    std::vector<float> weights;
    const char* rows = nullptr;
  };

  void Serve();
  void Wake();
  // Takes over new connections; false: the thread has to end.
  bool Adopt();
  void Poll(bool wait);
  // Answers the call that has waited longest, and with it those for the same layer.
  void AnswerNext();
  std::vector<Call> TakeNext();
  Content ReadBody(const Call& call) const;
  static void FindMissing(const Held& held, Content& content);
  // [rows, d]: the sums of the calls that are here, but for what is missing.
  std::vector<float> Compute(const std::vector<Call>& calls, const std::vector<Content>& contents,
                             const Held& held);
  void Answer(const Call& call, const AnswerHead& head, const float* sums,
              const std::vector<uint16_t>& missing);

  CallServer& server_;
  int wake_[2];
  std::mutex accepted_mutex_;
  std::vector<std::pair<int, int>> accepted_;  // (peer, fd)
  bool stop_ = false;                          // under the mutex
  std::vector<std::shared_ptr<Line>> lines_;
  std::deque<Call> calls_;
  std::thread thread_;
};

// One server's part in the calls of all.
class CallServer {
 public:
  CallServer(const CallSpec& spec, std::vector<std::shared_ptr<ExpertPool>> pools);

  const CallSpec& spec() const { return spec_; }
  std::shared_ptr<const Tables> tables() const;
  // From now on this table is in force, and none before it counts. resident [servers, layers,
  // experts].
  void SetTable(int64_t version, const bool* resident);
  // A table that will be in force, and may be elsewhere; and that it, and those after it, will not.
  void StageTable(int64_t version, const bool* resident);
  void DropTables(int64_t version);
  // All calls under way and to come fail: nobody is waited for any more.
  void Cancel() { cancelled_ = true; }
  bool cancelled() const { return cancelled_; }
  Caller& caller(int64_t device) { return *callers_[device]; }
  int64_t devices() const { return static_cast<int64_t>(callers_.size()); }
  Answerer& answerer() { return answerer_; }
  // Experts of a layer, which may be named more than once, as any device holds them.
  Held Find(int64_t layer, std::vector<int32_t> experts) const;
  // y [n, d]: as RunExperts, numbers are places in `held`.
  void Compute(const Held& held, const Assignments& rows, float* y);

  // So many rows of a layer of a step have calls that leave this server.
  void CountAway(int64_t step, int64_t layer, int64_t rows);
  // Calls change(sums), one thread at a time.
  template <typename Change>
  void Sum(const Change& change) {
    const std::lock_guard<std::mutex> lock(sums_mutex_);
    change(sums_);
  }
  void Count(int peer, PeerCounters::Name name, int64_t more) { counters_[peer].value[name] += more; }
  int64_t Counter(int peer, PeerCounters::Name name) const { return counters_[peer].value[name]; }
  // Rows that went to a server in a layer.
  void CountRows(int64_t layer, int peer, int64_t rows) { rows_[layer * spec_.servers + peer] += rows; }
  int64_t rows(int64_t layer, int peer) const { return rows_[layer * spec_.servers + peer]; }
  // The number of the own step that runs, which its calls carry.
  void BeginStep(int64_t step) { step_ = step; }
  int64_t step() const { return step_; }
  // Records from now on, so many events until they are taken; once, before anything is called.
  void StartTrace(size_t most) { trace_ = std::make_unique<Trace>(most); }
  // Null: nothing is recorded.
  Trace* trace() const { return trace_.get(); }

 private:
  std::shared_ptr<const Table> NewTable(int64_t version, const bool* resident) const;

  const CallSpec spec_;
  const std::vector<std::shared_ptr<ExpertPool>> pools_;
  std::atomic<bool> cancelled_{false};
  mutable std::mutex tables_mutex_;
  std::shared_ptr<const Tables> tables_;
  std::mutex sums_mutex_;
  CallSums sums_;
  std::vector<int64_t> waited_;                // by layer, the last step in which it waited
  std::deque<PeerCounters> counters_;          // by rank
  std::deque<std::atomic<int64_t>> rows_;      // [layers, servers]
  std::atomic<int64_t> step_ = 0;
  std::unique_ptr<Trace> trace_;
  std::vector<std::unique_ptr<Caller>> callers_;
  Answerer answerer_;
};

}  // namespace dance

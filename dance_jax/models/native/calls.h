// Expert calls between servers that step independently. A server calls the servers that hold experts of
// its tokens, and answers the calls of others for the experts that it holds.
//
// A call names experts, never slots, and asks for one sum per row. A call is pure, so it may be
// repeated and answered by any holder. For its own calls, every device of a server has a connection
// to every other server (`Caller`). One thread per server answers the calls of others (`Answerer`);
// this thread makes no calls and waits for no step, so no two servers can wait for each other.

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

// Which servers hold which experts, according to one version of the placement.
struct Table {
  int64_t version;
  int64_t experts;            // of a layer
  std::vector<Ranks> holders;  // [layers * experts]

  const Ranks& Holders(int64_t layer, int64_t expert) const {
    return holders[layer * experts + expert];
  }
};

// The placement tables that a server knows: the table in force, then in order the tables of batches of
// moves that this server has loaded and that may already be in force on other servers.
using Tables = std::vector<std::shared_ptr<const Table>>;

// The experts of a layer that were looked up on this server.
struct Held {
  std::vector<int32_t> experts;  // ascending
  std::vector<ExpertPool::Holding> holdings;  // null if the expert is not here

  // Index of an expert, or -1 if the expert is not here.
  int32_t Place(int32_t expert) const;
};

// The rows that a server is asked for are split into at most this many groups, one call each.
constexpr size_t kMostGroups = 4;
// Maximum unanswered calls of one caller at one callee: one per group, and a repeat of another's call.
constexpr size_t kMostUnanswered = kMostGroups + 1;

// The server to ask for each of a row's experts, or -1 if no server holds the expert. Greedy: the
// server that holds most of the experts, then the server that holds most of the rest, and so on, as
// in placement/visit.py. holders [k]; order: all servers, in the order in which the caller prefers
// them.
std::vector<int> ChooseServers(const std::vector<Ranks>& holders, const std::vector<int>& order);

// What a server counts per peer. All counters only grow. models/counters.py has the same fields in the
// same order: change both together.
struct PeerCounters {
  enum Name {
    kCalls,          // sent to the peer, repeats included
    kRows,           // in these calls
    kBytesSent,      // of calls to the peer and of answers to its calls
    kBytesReceived,
    kRepeats,        // calls also sent to other servers, because the peer's answer was late
    kRefusals,       // calls for which the peer did not have all experts
    kLost,           // calls lost because the peer's connection ended
    kFailedRows,     // rows that failed for lack of an expert that the peer holds
    kWaitedNs,       // from sending a call to its answer's arrival
    kAnswered,       // calls of the peer that were answered here
    kAnsweredRows,
    kQueuedNs,       // time that the peer's calls waited here for their turn
    kCount
  };
  std::array<std::atomic<int64_t>, kCount> value{};
};

// Totals over all calls and layers. models/counters.py (Sums, Moved) has the same fields in the same order:
// change both together.
struct CallSums {
  // Of own steps: layers run, seconds computing local experts, seconds waiting for answers.
  double layers = 0, local_s = 0, waited_s = 0;
  // Layers of own steps in which at least one row has calls to other servers, counted once per step;
  // the number of these rows.
  double layers_waited = 0, rows_away = 0;
  // Of the peers' calls: seconds computing, batches (a batch may answer several calls).
  double served_s = 0, served_batches = 0;
  // Of answers: number, seconds on the network, bytes both ways, and the products of these that a
  // linear fit of seconds over bytes needs.
  double answers = 0, s = 0, bytes = 0, bytes_bytes = 0, bytes_s = 0, s_s = 0;
};

struct CallSpec {
  int rank, servers;
  int64_t layers, experts;  // experts of each layer
  Wire wire;
  uint32_t most_rows;  // maximum of a call
  // Without an answer for repeat_ns a call is also sent to another holder; after fail_ns it fails. Both
  // times are longer for calls that are expected to take long.
  int64_t repeat_ns, fail_ns;
  std::vector<int> order;  // all servers, in this server's order of preference
};

class CallServer;

// Rows of a layer on one device: all rows, or a group of them.
struct LayerRows {
  int64_t layer;
  const float* x;         // [t, d]
  const int32_t* expert;  // [t, k]
  const float* weight;    // [t, k]
  const bool* valid;      // [t], false for a row without experts
  int64_t t, k;
};

// Makes the calls of one device's steps. One thread at a time runs a layer, not always the same thread.
class Caller {
 public:
  Caller(CallServer& server, int64_t device);
  ~Caller();

  // Adopts a connection to a peer in place of the previous connection. Thread-safe.
  void Dial(int peer, int fd);
  // Sends calls for a group of a layer's rows, which follows `first` other rows. The group with
  // `first` = 0 begins the layer.
  void Start(const LayerRows& rows, int64_t first);
  // y [t, d] = the weighted sums of the experts of each row of that group: computes the experts that
  // are here and waits for the calls. failed[r] is true if no server answered for an expert of the row;
  // its sum is then undefined. Returns false if no such group was started.
  bool Finish(int64_t first, float* y, bool* failed);

 private:
  struct Pair {
    int32_t row;
    uint16_t expert;
    float weight;
  };
  // The pairs that one server is asked for.
  struct Part {
    // kDone: `sums` covers all pairs except those that `rest` asks other servers for.
    enum State { kWaiting, kDone, kLost, kNowhere, kFailed } state = kWaiting;
    int peer = -1;
    uint64_t id = 0;             // 0 until the call is sent
    std::vector<Pair> pairs;     // sorted by row
    std::vector<int32_t> rows;
    std::shared_ptr<const Tables> tables;  // tables that chose the peer
    Ranks asked;                 // servers already asked for the same pairs
    int64_t repeat_at = 0, fail_at = 0;
    bool repeated = false;
    std::vector<float> sums;     // [rows, d]
    std::vector<Part*> rest;
    std::vector<Part*> instead;  // ask other servers for the same pairs, because this part is late
  };
  // How long a peer takes to answer.
  struct Pace {
    double base_s = 0.02, byte_s = 1e-6;

    double Expected(size_t bytes) const { return base_s + byte_s * bytes; }
    void Learn(size_t bytes, double s);
  };
  struct Sent {
    uint64_t id;
    int64_t at;
    size_t bytes;   // both ways
    size_t queued;  // `bytes` plus those of the earlier calls that were unanswered
    int64_t step, layer;
    int32_t rows;
  };
  // Rows whose calls are sent together.
  struct Group {
    int64_t first, t, k;
    Held held;                   // the local experts of the group
    std::vector<int32_t> local;  // [t, k]: indices in `held`, or -1
    std::vector<float> weights;  // [t, k]
    std::vector<Part*> parts;    // for all other experts
    std::vector<char> failed;    // [t]
  };
  struct Line {
    std::unique_ptr<Channel> channel;
    std::vector<Sent> unanswered;
    // An answer is late: the peer gets no more calls until it has answered all of them.
    bool suspect = false;
    Pace pace;
  };

  void Adopt();
  std::vector<std::vector<Pair>> Groups(const std::vector<Pair>& pairs) const;
  // Servers that may be asked, including this server.
  Ranks Usable() const;
  // The servers of `usable` that hold an expert: by the newest table that is not newer than `version`.
  // If that table names none: by older tables, then by newer ones, the nearest first.
  Ranks Holders(uint16_t expert, const Ranks& usable, int64_t version) const;
  // Creates parts for these pairs and sends them, or computes them here. Does not ask servers in
  // `asked`. Pairs without a holder stay kNowhere for `patience_ns`, then fail.
  std::vector<Part*> Place(const std::vector<Pair>& pairs, const Ranks& asked, int64_t version,
                           int64_t patience_ns);
  // Counts the rows of a group that have calls to other servers.
  void CountAway(const Group& group) const;
  // Sends a part, or leaves the part unsent while its server has too many unanswered calls.
  void Send(Part& part);
  void ComputeHere(Part& part);
  void Wait(const std::vector<Part*>& first);
  void Review(Part& part, int64_t now);
  // The connection to a peer has ended: forgets the calls that the peer had not answered.
  void Forget(int peer);
  // The part's sums have arrived, except for the `missing` pairs, which go to other servers.
  void Replace(Part& part, const std::vector<Pair>& missing, int64_t version, int64_t patience_ns);
  // The part will get no answer.
  void Lose(Part& part);
  void Repeat(Part& part);
  // When `Wait` must look at its parts again.
  int64_t NextLook() const;
  // Sends and reads what is possible without blocking; if nothing is, waits until `until` at most.
  void Poll(int64_t until);
  void Read(int peer);
  void Answered(int peer, const AnswerHead& head, const char* body);
  void TakeAnswer(Part& part, const AnswerHead& head, const char* body);
  void Record(int peer, const Sent& sent, TraceEvent::Outcome outcome, const AnswerHead& head) const;
  // y and failed begin with row `first`.
  void Add(const Part& part, int64_t first, float* y, bool* failed) const;
  void CountFailed(const Part& part) const;
  static bool Succeeded(const Part& part);
  // Whether there is nothing left to wait for.
  static bool Resolved(const Part& part);

  CallServer& server_;
  const int64_t device_;
  std::vector<Line> lines_;  // by rank
  std::mutex dialled_mutex_;
  std::vector<std::pair<int, int>> dialled_;  // (peer, fd)
  uint64_t next_id_;
  // The layer that runs.
  int64_t step_ = 0, layer_ = 0;
  std::vector<float> x_;  // rows of all groups so far
  std::shared_ptr<const Tables> tables_;
  std::deque<Part> parts_;
  std::deque<Group> groups_;
};

// Answers the calls of other servers in a thread of its own.
class Answerer {
 public:
  explicit Answerer(CallServer& server);
  ~Answerer();

  // Adopts a connection on which a peer sends calls. Thread-safe.
  void Accept(int peer, int fd);

 private:
  struct Line {
    int peer;
    std::unique_ptr<Channel> channel;
    size_t waiting = 0;  // the peer's queued calls

    // Reads no more while too many calls wait; what the peer sends then waits in the connection.
    bool Reads() const { return waiting + channel->unsent() < kMostUnanswered; }
  };
  struct Call {
    // Shared, because the connection may end while the call waits for its turn.
    std::shared_ptr<Line> line;
    CallHead head;
    std::vector<char> body;
    int64_t arrived;
  };
  // A parsed call body; pairs are sorted by row.
  struct Content {
    // False if the call does not fit this model, so that it must not be computed.
    bool sane = false;
    // Whether any of the experts is on this server; `missing` lists the experts that are not.
    bool here = false;
    std::vector<uint16_t> missing;
    const uint8_t* counts = nullptr;
    std::vector<uint16_t> experts;
    std::vector<float> weights;
    const char* rows = nullptr;
  };

  void Serve();
  void Wake();
  // Adopts new connections. Returns false if the thread has to end.
  bool Adopt();
  void Poll(bool wait);
  // Answers the call that has waited longest, together with waiting calls for the same layer.
  void AnswerNext();
  std::vector<Call> TakeNext();
  Content ReadBody(const Call& call) const;
  static void FindMissing(const Held& held, Content& content);
  // Sums [rows, d] of the calls that are `here`, without their missing experts.
  std::vector<float> Compute(const std::vector<Call>& calls, const std::vector<Content>& contents,
                             const Held& held);
  void Answer(const Call& call, const AnswerHead& head, const float* sums,
              const std::vector<uint16_t>& missing);

  CallServer& server_;
  int wake_[2];
  std::mutex accepted_mutex_;
  std::vector<std::pair<int, int>> accepted_;  // (peer, fd)
  bool stop_ = false;                          // guarded by accepted_mutex_
  std::vector<std::shared_ptr<Line>> lines_;
  std::deque<Call> calls_;
  std::thread thread_;
};

// One server's side of the expert calls.
class CallServer {
 public:
  CallServer(const CallSpec& spec, std::vector<std::shared_ptr<ExpertPool>> pools);

  const CallSpec& spec() const { return spec_; }
  std::shared_ptr<const Tables> tables() const;
  // Puts a table in force and drops the tables before it. resident [servers, layers, experts].
  void SetTable(int64_t version, const bool* resident);
  // StageTable adds a table that will be in force and may already be on other servers. DropTables drops
  // the staged tables from `version` on, which will not be in force.
  void StageTable(int64_t version, const bool* resident);
  void DropTables(int64_t version);
  // All running and future calls fail; no peer is waited for any more.
  void Cancel() { cancelled_ = true; }
  // A sign that this server's steps make progress, waiting for peers included.
  void Beat() { ++beats_; }
  int64_t beats() const { return beats_; }
  bool cancelled() const { return cancelled_; }
  Caller& caller(int64_t device) { return *callers_[device]; }
  int64_t devices() const { return static_cast<int64_t>(callers_.size()); }
  Answerer& answerer() { return answerer_; }
  // Looks up experts of a layer on all devices. `experts` may contain duplicates.
  Held Find(int64_t layer, std::vector<int32_t> experts) const;
  // y [n, d]: like RunExperts, where expert numbers are indices in `held`.
  void Compute(const Held& held, const Assignments& rows, float* y);

  // Counts the rows of one layer of a step that have calls to other servers.
  void CountAway(int64_t step, int64_t layer, int64_t rows);
  // Calls change(sums) under a lock.
  template <typename Change>
  void Sum(const Change& change) {
    const std::lock_guard<std::mutex> lock(sums_mutex_);
    change(sums_);
  }
  void Count(int peer, PeerCounters::Name name, int64_t more) { counters_[peer].value[name] += more; }
  int64_t Counter(int peer, PeerCounters::Name name) const { return counters_[peer].value[name]; }
  // Counts rows of a layer that were sent to a peer.
  void CountRows(int64_t layer, int peer, int64_t rows) { rows_[layer * spec_.servers + peer] += rows; }
  int64_t rows(int64_t layer, int peer) const { return rows_[layer * spec_.servers + peer]; }
  // Sets the number of the running step, which the calls carry.
  void BeginStep(int64_t step) { step_ = step; }
  int64_t step() const { return step_; }
  // Starts to record at most `most` events until they are taken; at most once, before any call.
  void StartTrace(size_t most) { trace_ = std::make_unique<Trace>(most); }
  // Null if nothing is recorded.
  Trace* trace() const { return trace_.get(); }

 private:
  std::shared_ptr<const Table> NewTable(int64_t version, const bool* resident) const;

  const CallSpec spec_;
  const std::vector<std::shared_ptr<ExpertPool>> pools_;
  std::atomic<bool> cancelled_{false};
  std::atomic<int64_t> beats_{0};
  mutable std::mutex tables_mutex_;
  std::shared_ptr<const Tables> tables_;
  std::mutex sums_mutex_;
  CallSums sums_;
  std::vector<int64_t> waited_;                // by layer: last step with calls to others
  std::deque<PeerCounters> counters_;          // by rank
  std::deque<std::atomic<int64_t>> rows_;      // [layers, servers]
  std::atomic<int64_t> step_ = 0;
  std::unique_ptr<Trace> trace_;
  std::vector<std::unique_ptr<Caller>> callers_;
  Answerer answerer_;
};

}  // namespace dance

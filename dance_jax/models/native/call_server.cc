// Expert calls as XLA custom calls, and C functions of the call server for Python.

#include <cstring>
#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "calls.h"
#include "pools.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace dance {

CallServer::CallServer(const CallSpec& spec, std::vector<std::shared_ptr<ExpertPool>> pools)
    : spec_(spec),
      pools_(std::move(pools)),
      tables_(std::make_shared<Tables>(1, NewTable(0, nullptr))),
      waited_(spec.layers, -1),
      counters_(spec.servers),
      rows_(spec.layers * spec.servers),
      answerer_(*this) {
  for (size_t device = 0; device < pools_.size(); ++device) {
    callers_.push_back(std::make_unique<Caller>(*this, device));
  }
}

int32_t Held::Place(int32_t expert) const {
  const auto at = std::lower_bound(experts.begin(), experts.end(), expert) - experts.begin();
  return holdings[at] ? static_cast<int32_t>(at) : -1;
}

std::shared_ptr<const Table> CallServer::NewTable(int64_t version, const bool* resident) const {
  const int64_t count = spec_.layers * spec_.experts;
  auto table = std::make_shared<Table>(Table{version, spec_.experts, std::vector<Ranks>(count)});
  for (int64_t n = 0; resident != nullptr && n < spec_.servers; ++n) {
    for (int64_t i = 0; i < count; ++i) table->holders[i][n] = resident[n * count + i];
  }
  return table;
}

std::shared_ptr<const Tables> CallServer::tables() const {
  const std::lock_guard<std::mutex> lock(tables_mutex_);
  return tables_;
}

void CallServer::CountAway(int64_t step, int64_t layer, int64_t rows) {
  Sum([&](CallSums& sums) {
    sums.layers_waited += waited_[layer] != step;
    sums.rows_away += rows;
    waited_[layer] = step;
  });
}

void CallServer::SetTable(int64_t version, const bool* resident) {
  auto tables = std::make_shared<Tables>(1, NewTable(version, resident));
  const std::lock_guard<std::mutex> lock(tables_mutex_);
  for (const auto& table : *tables_) {
    if (table->version > version) tables->push_back(table);
  }
  tables_ = std::move(tables);
}

void CallServer::StageTable(int64_t version, const bool* resident) {
  auto table = NewTable(version, resident);
  const std::lock_guard<std::mutex> lock(tables_mutex_);
  auto tables = std::make_shared<Tables>(*tables_);
  tables->push_back(std::move(table));
  tables_ = std::move(tables);
}

void CallServer::DropTables(int64_t version) {
  const std::lock_guard<std::mutex> lock(tables_mutex_);
  auto tables = std::make_shared<Tables>(1, tables_->front());
  for (size_t i = 1; i < tables_->size(); ++i) {
    if ((*tables_)[i]->version < version) tables->push_back((*tables_)[i]);
  }
  tables_ = std::move(tables);
}

Held CallServer::Find(int64_t layer, std::vector<int32_t> experts) const {
  std::sort(experts.begin(), experts.end());
  experts.erase(std::unique(experts.begin(), experts.end()), experts.end());
  std::vector<int64_t> ids;
  for (const int32_t expert : experts) ids.push_back(layer * spec_.experts + expert);
  Held held{std::move(experts), std::vector<ExpertPool::Holding>(ids.size())};
  for (const auto& pool : pools_) {
    const auto here = pool->Find(ids);
    for (size_t i = 0; i < ids.size(); ++i) {
      if (!held.holdings[i]) held.holdings[i] = here[i];
    }
  }
  return held;
}

void CallServer::Compute(const Held& held, const Assignments& rows, float* y) {
  std::vector<const Expert*> experts;
  for (const auto& each : held.holdings) experts.push_back(each ? &each->expert : nullptr);
  const ExpertSpec& spec = pools_.front()->spec();
  CountRouted([&] { return RunExperts(spec.d, spec.activation, experts, rows, y); });
}

namespace {

std::mutex servers_mutex;
std::map<int64_t, std::shared_ptr<CallServer>> call_servers;
int64_t next_server = 1;
// The number of a device's caller is its server's number times this, plus the device.
constexpr int64_t kMostDevices = 1024;

std::shared_ptr<CallServer> FindServer(int64_t number) {
  const std::lock_guard<std::mutex> lock(servers_mutex);
  const auto found = call_servers.find(number);
  return found == call_servers.end() ? nullptr : found->second;
}

using Rows = ffi::Buffer<ffi::F32, 2>;
using Numbers = ffi::Buffer<ffi::S32, 2>;
using Flags = ffi::Buffer<ffi::PRED, 1>;

// The caller that a step names. Null if there is no such caller.
Caller* FindCaller(int64_t number, std::shared_ptr<CallServer>& server) {
  server = FindServer(number / kMostDevices);
  const int64_t device = number % kMostDevices;
  return server && device < server->devices() ? &server->caller(device) : nullptr;
}

// Sends calls for a group of a layer's rows, which follows `first` other rows. then_out is a copy of
// `then`: computations on then_out start only after the calls are sent.
ffi::Error SendCalls(int64_t first, ffi::Buffer<ffi::S32> caller, ffi::Buffer<ffi::S32> layer, Rows x,
                     Numbers expert, Rows weight, Flags valid, ffi::AnyBuffer then,
                     ffi::Result<ffi::AnyBuffer> then_out) {
  std::shared_ptr<CallServer> server;
  Caller* const own = FindCaller(caller.typed_data()[0], server);
  if (own == nullptr) return ffi::Error::InvalidArgument("no call server has this number");
  const CallSpec& spec = server->spec();
  const LayerRows rows{layer.typed_data()[0],   x.typed_data(),     expert.typed_data(),
                       weight.typed_data(),     valid.typed_data(), expert.dimensions()[0],
                       expert.dimensions()[1]};
  if (x.dimensions()[1] != spec.wire.d || rows.layer < 0 || rows.layer >= spec.layers) {
    return ffi::Error::InvalidArgument("the server's experts are of another model");
  }
  if (x.dimensions()[0] != rows.t || weight.dimensions() != expert.dimensions() ||
      valid.dimensions()[0] != rows.t) {
    return ffi::Error::InvalidArgument("rows, experts, weights and flags differ in number");
  }
// The callees would reject such a call and close the connection.
  if (rows.t > spec.most_rows) {
    return ffi::Error::InvalidArgument("more rows than a call may have");
  }
  own->Start(rows, first);
  std::memcpy(then_out->untyped_data(), then.untyped_data(), then.size_bytes());
  return ffi::Error::Success();
}

// y = the weighted sums of the experts of each row of a group, on whichever server the experts are.
// failed: the rows that failed. The third argument only orders this call behind other computations.
ffi::Error ReceiveSums(int64_t first, ffi::Buffer<ffi::S32> caller, ffi::AnyBuffer,
                       ffi::Result<Rows> y, ffi::Result<Flags> failed) {
  std::shared_ptr<CallServer> server;
  Caller* const own = FindCaller(caller.typed_data()[0], server);
  if (own == nullptr) return ffi::Error::InvalidArgument("no call server has this number");
  if (!own->Finish(first, y->typed_data(), failed->typed_data())) {
    return ffi::Error::InvalidArgument("no calls were sent for these rows");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dance

using dance::Rows;

XLA_FFI_DEFINE_HANDLER_SYMBOL(SendCalls, dance::SendCalls,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("first")
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Rows>()
                                  .Arg<dance::Numbers>()
                                  .Arg<Rows>()
                                  .Arg<dance::Flags>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ReceiveSums, dance::ReceiveSums,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("first")
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<Rows>()
                                  .Ret<dance::Flags>());

extern "C" {

// Creates a server whose devices have these pools. Returns its number, or 0 if a pool does not exist.
// numbers [8]: rank, servers, layers, experts of a layer, kind of the wire, maximum rows of a call, ns
// until a call is repeated, ns until a call fails. order [servers]: preferred order of callees.
int64_t CallServerNew(const int64_t* numbers, const int32_t* order, int64_t devices,
                      const int64_t* pools) {
  std::vector<std::shared_ptr<dance::ExpertPool>> own;
  for (int64_t device = 0; device < devices; ++device) {
    own.push_back(dance::FindPool(pools[device]));
    if (!own.back()) return 0;
  }
  const dance::CallSpec spec{static_cast<int>(numbers[0]),
                             static_cast<int>(numbers[1]),
                             numbers[2],
                             numbers[3],
                             {static_cast<dance::WireKind>(numbers[4]), own.front()->spec().d, numbers[3]},
                             static_cast<uint32_t>(numbers[5]),
                             numbers[6],
                             numbers[7],
                             {order, order + numbers[1]}};
  auto server = std::make_shared<dance::CallServer>(spec, std::move(own));
  const std::lock_guard<std::mutex> lock(dance::servers_mutex);
  dance::call_servers[dance::next_server] = std::move(server);
  return dance::next_server++;
}

// The server is destroyed when its last running call is done.
void CallServerDelete(int64_t number) {
  const auto server = dance::FindServer(number);
  const std::lock_guard<std::mutex> lock(dance::servers_mutex);
  dance::call_servers.erase(number);
}

// resident: [servers, layers, experts].
void CallServerTable(int64_t number, int64_t version, const bool* resident) {
  if (const auto server = dance::FindServer(number)) server->SetTable(version, resident);
}

void CallServerStage(int64_t number, int64_t version, const bool* resident) {
  if (const auto server = dance::FindServer(number)) server->StageTable(version, resident);
}

void CallServerDrop(int64_t number, int64_t version) {
  if (const auto server = dance::FindServer(number)) server->DropTables(version);
}

void CallServerCancel(int64_t number) {
  if (const auto server = dance::FindServer(number)) server->Cancel();
}

int64_t CallServerBeats(int64_t number) {
  const auto server = dance::FindServer(number);
  return server ? server->beats() : 0;
}

// Connected, non-blocking sockets: Dial for calls of a device to a peer, Accept for calls of a peer.
void CallServerDial(int64_t number, int64_t device, int peer, int fd) {
  if (const auto server = dance::FindServer(number)) server->caller(device).Dial(peer, fd);
}

void CallServerAccept(int64_t number, int peer, int fd) {
  if (const auto server = dance::FindServer(number)) server->answerer().Accept(peer, fd);
}

void CallServerSums(int64_t number, dance::CallSums* sums) {
  if (const auto server = dance::FindServer(number)) {
    server->Sum([&](const dance::CallSums& found) { *sums = found; });
  }
}

// counters [servers, PeerCounters::kCount]; rows [layers, servers]: rows sent to each server.
void CallServerCounters(int64_t number, int64_t* counters, int64_t* rows) {
  const auto server = dance::FindServer(number);
  if (!server) return;
  const dance::CallSpec& spec = server->spec();
  for (int n = 0; n < spec.servers; ++n) {
    for (int i = 0; i < dance::PeerCounters::kCount; ++i) {
      *counters++ = server->Counter(n, static_cast<dance::PeerCounters::Name>(i));
    }
  }
  for (int64_t layer = 0; layer < spec.layers; ++layer) {
    for (int n = 0; n < spec.servers; ++n) *rows++ = server->rows(layer, n);
  }
}

// The server's calls carry the number of this step from now on.
void CallServerStep(int64_t number, int64_t step) {
  if (const auto server = dance::FindServer(number)) server->BeginStep(step);
}

// Starts to record calls and layers: at most `most` events until they are taken.
void CallServerTrace(int64_t number, int64_t most) {
  if (const auto server = dance::FindServer(number)) server->StartTrace(most);
}

// Takes out the oldest events, `most` at most, and returns their number. lost: events since the last
// call that were dropped because the trace was full.
int64_t CallServerTakeTrace(int64_t number, dance::TraceEvent* events, int64_t most, int64_t* lost) {
  const auto server = dance::FindServer(number);
  return server && server->trace() ? server->trace()->Take(events, most, lost) : 0;
}

// For tests: the servers [k] that are asked for a row's experts. masks [k]: holders of each expert, up
// to 64 servers; order [servers].
void ChooseServersForTest(int64_t k, const uint64_t* masks, int64_t servers, const int32_t* order,
                          int64_t* found) {
  std::vector<dance::Ranks> holders(masks, masks + k);
  const std::vector<int> chosen = dance::ChooseServers(holders, {order, order + servers});
  std::copy(chosen.begin(), chosen.end(), found);
}

}  // extern "C"

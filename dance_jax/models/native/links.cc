// What servers send each other in one MoE layer, as XLA custom calls over TCP: links_cpu.py makes
// the connections and traces the calls.
//
// XLA:CPU has no all-to-all of unequal parts, and its collectives run one after the other with a
// handshake each. Here a call sends to all peers and receives from all of them at once, and nothing
// but the rows that go, behind a small head. Numbers are little endian, like all JAX's machines.

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

enum Phase : uint32_t { kDispatch = 0, kReturn = 1 };

constexpr uint32_t kMagic = 0x31786a64;  // "djx1"
// A peer that acknowledges nothing for so long, while something is under way to it, is gone.
constexpr int64_t kSilenceMs = 10'000;
// How often that is looked at while a call waits.
constexpr int kLookMs = 1'000;

// Before the rows of every message. In a dispatch what all servers need to know follows, int32
// each: rows from the sender to each server, and what the sender has to do. Two servers that do
// not run the same step find it out here.
struct Head {
  uint32_t magic;
  uint32_t exchange;  // exchanges since the connections were made
  uint32_t phase;
  uint32_t row_bytes;
};
static_assert(sizeof(Head) == 16);

struct Peer {
  std::string name;
  int fd = -1;
  // This call's messages: what is sent, and what is received as far as its size is known.
  std::vector<char> out, in;
  size_t sent = 0, got = 0;
  // Payload in all calls.
  std::atomic<int64_t> bytes_sent{0}, bytes_received{0};

  bool sending() const { return sent < out.size(); }
  bool receiving() const { return got < in.size(); }
};

// Sums over the calls of one phase: 1, seconds until the last peer's first bytes came; and over
// those that moved b bytes in the busier direction in s seconds from then on: 1, s, b, bb, bs, ss.
constexpr int kSums = 8;
using Timing = std::atomic<double>[kSums];

struct Links {
  int rank = 0;
  std::vector<Peer> peers;  // by rank; this server's own has no connection (-1)
  uint32_t exchange = 0;
  Timing timing[2] = {};

  // The devices of this server meet in every call: its first one, the gateway, makes the call.
  std::mutex mutex;
  std::condition_variable changed;
  int64_t made = 0;           // calls
  std::vector<int64_t> used;  // calls whose results a device has taken
  std::string broken;         // why no call can be made any more

  explicit Links(int servers) : peers(servers) {}
  ~Links() {
    for (Peer& peer : peers) close(peer.fd);
  }
  // Every peer learns it at once, as its connection ends.
  void Break(const std::string& why) {
    broken = why;
    for (Peer& peer : peers) shutdown(peer.fd, SHUT_RDWR);
    changed.notify_all();
  }
};

std::mutex open_mutex;
std::shared_ptr<Links> open_links;  // those of this process

// Null when none are open between so many servers.
std::shared_ptr<Links> Current(size_t servers) {
  std::lock_guard<std::mutex> lock(open_mutex);
  return open_links != nullptr && open_links->peers.size() == servers ? open_links : nullptr;
}

int64_t Now() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

// Something is under way to the peer, and nothing came back for too long. An idle peer, or one too
// busy to read, acknowledges; the kernel's keep-alive finds out about idle ones that are gone.
bool Vanished(const Peer& peer, int64_t start) {
#if defined(__linux__)
  tcp_info info;
  socklen_t size = sizeof(info);
  if (getsockopt(peer.fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return false;
  const int64_t waited_ms = (Now() - start) / 1'000'000;
  const int64_t silent_ms = std::min<int64_t>(info.tcpi_last_ack_recv, waited_ms);
  return info.tcpi_unacked > 0 && silent_ms > kSilenceMs;
#else
  return false;
#endif
}

// One call: all peers' messages, both ways at once. Errors are texts that begin with the peer's
// name; "" is success.
class Transfer {
 public:
  // head: of all messages, both ways. head_bytes: what precedes their rows. rows_from(peer): rows
  // of the peer's message, whose head is there; -1: too many.
  Transfer(Links& links, const Head& head, size_t head_bytes,
           std::function<int64_t(const Peer&)> rows_from)
      : links_(links), head_(head), head_bytes_(head_bytes), rows_from_(std::move(rows_from)),
        start_(Now()), began_(start_) {
    for (Peer& peer : links_.peers) peer.sent = peer.got = 0;
  }

  std::string Run() {
    while (true) {
      // Sending is tried before it is waited for: there is nearly always room.
      for (Peer& peer : links_.peers) {
        const std::string wrong = Send(peer);
        if (!wrong.empty()) return peer.name + ": " + wrong;
      }
      std::vector<pollfd> polled;
      std::vector<Peer*> busy;
      for (Peer& peer : links_.peers) {
        const short events = (peer.sending() ? POLLOUT : 0) | (peer.receiving() ? POLLIN : 0);
        if (events == 0) continue;
        polled.push_back({peer.fd, events, 0});
        busy.push_back(&peer);
      }
      if (busy.empty()) break;
      const int ready = poll(polled.data(), polled.size(), kLookMs);
      if (ready < 0 && errno != EINTR) return std::string("poll: ") + std::strerror(errno);
      for (size_t i = 0; i < busy.size() && ready >= 0; ++i) {
        std::string wrong;
        if (polled[i].revents != 0) wrong = Receive(*busy[i]);
        if (ready == 0 && Vanished(*busy[i], start_)) wrong = "it has vanished";
        if (!wrong.empty()) return busy[i]->name + ": " + wrong;
      }
    }
    Count();
    return "";
  }

 private:
  std::string Send(Peer& peer) {
    while (peer.sending()) {
      const ssize_t n = send(peer.fd, peer.out.data() + peer.sent, peer.out.size() - peer.sent,
                             MSG_NOSIGNAL);
      if (n >= 0) {
        peer.sent += n;
      } else if (errno == EAGAIN) {
        break;
      } else if (errno != EINTR) {
        return errno == EPIPE ? kClosed : std::strerror(errno);
      }
    }
    return "";
  }

  std::string Receive(Peer& peer) {
    if (peer.receiving() && peer.got == 0) began_ = Now();
    while (peer.receiving()) {
      const ssize_t n = recv(peer.fd, peer.in.data() + peer.got, peer.in.size() - peer.got, 0);
      if (n == 0) return kClosed;
      if (n < 0) {
        if (errno == EAGAIN) break;
        if (errno != EINTR) return std::strerror(errno);
        continue;
      }
      peer.got += n;
      if (peer.got != head_bytes_) continue;
      const std::string wrong = CheckHead(*reinterpret_cast<const Head*>(peer.in.data()));
      if (!wrong.empty()) return wrong;
      const int64_t rows = rows_from_(peer);
      if (rows < 0) return "it sends more rows than there is room for";
      peer.in.resize(head_bytes_ + rows * head_.row_bytes);
    }
    return "";
  }

  std::string CheckHead(const Head& head) const {
    if (head.magic != kMagic) return "it speaks another protocol";
    if (head.exchange != head_.exchange || head.phase != head_.phase) {
      return "it is at the " + Where(head) + ", this server at the " + Where(head_) +
             ": they do not run the same steps";
    }
    if (head.row_bytes != head_.row_bytes) {
      return "it sends rows of " + std::to_string(head.row_bytes) + " bytes, this server of " +
             std::to_string(head_.row_bytes) + ": they do not run the same program";
    }
    return "";
  }

  static std::string Where(const Head& head) {
    return (head.phase == kDispatch ? "dispatch of exchange " : "return of exchange ") +
           std::to_string(head.exchange);
  }

  void Count() {
    size_t out = 0, in = 0;
    for (Peer& peer : links_.peers) {
      peer.bytes_sent += peer.out.size();
      peer.bytes_received += peer.in.size();
      out += peer.out.size(), in += peer.in.size();
    }
    Timing& timing = links_.timing[head_.phase];
    const double waited = (began_ - start_) * 1e-9, s = (Now() - began_) * 1e-9;
    const double b = std::max(out, in), more[kSums] = {1, waited, 1, s, b, b * b, b * s, s * s};
    // This thread alone writes them.
    for (int i = 0; i < (b > 0 ? kSums : 2); ++i) timing[i] = timing[i] + more[i];
  }

  static constexpr const char* kClosed = "it closed the connection";
  Links& links_;
  const Head head_;
  const size_t head_bytes_;
  const std::function<int64_t(const Peer&)> rows_from_;
  const int64_t start_;
  int64_t began_;  // when the last peer's first bytes came
};

// One call of all devices of this server: the gateway makes it, then each uses what it brought. All
// succeed or all fail: one that did not would wait in XLA for a sibling that is gone.
//   call(): "" or what went wrong; use(): copies what came out of the peers' messages.
template <typename Call, typename Use>
ffi::Error Together(Links& links, int device, int devices, const Call& call, const Use& use) {
  std::unique_lock<std::mutex> lock(links.mutex);
  links.used.resize(devices, links.made);
  auto until = [&](auto reached) {
    links.changed.wait(lock, [&] { return reached() || !links.broken.empty(); });
  };
  if (device == 0) {
    until([&] { return *std::min_element(links.used.begin(), links.used.end()) == links.made; });
    if (links.broken.empty()) {
      lock.unlock();
      const std::string wrong = call();
      lock.lock();
      if (wrong.empty()) {
        ++links.made;
      } else if (links.broken.empty()) {
        links.Break("server " + wrong);
      }
      links.changed.notify_all();
    }
  } else {
    until([&] { return links.made > links.used[device]; });
  }
  if (!links.broken.empty()) return ffi::Error::Internal(links.broken);
  lock.unlock();
  use();
  lock.lock();
  ++links.used[device];
  links.changed.notify_all();
  return ffi::Error::Success();
}

// Rows of equal width, one after the other.
struct Column {
  char* data;
  size_t width;  // bytes of a row

  char* row(int64_t number) const { return data + number * width; }
};

// The first `leading` dimensions count rows.
Column ColumnOf(const ffi::AnyBuffer& buffer, size_t leading) {
  int64_t rows = 1;
  for (size_t i = 0; i < leading; ++i) rows *= buffer.dimensions()[i];
  return {static_cast<char*>(buffer.untyped_data()), buffer.size_bytes() / rows};
}

Column ColumnOf(ffi::Result<ffi::AnyBuffer> buffer, size_t leading) {
  return ColumnOf(*buffer, leading);
}

// Buffers: ffi::RemainingArgs or ffi::RemainingRets.
template <typename Buffers>
std::vector<Column> ColumnsOf(const Buffers& buffers, size_t leading) {
  std::vector<Column> columns;
  for (size_t i = 0; i < buffers.size(); ++i) {
    columns.push_back(ColumnOf(buffers.template get<ffi::AnyBuffer>(i).value(), leading));
  }
  return columns;
}

uint32_t Width(const std::vector<Column>& columns) {
  uint32_t width = 0;
  for (const Column& column : columns) width += column.width;
  return width;
}

void Append(std::vector<char>& out, const void* from, size_t bytes) {
  const char* begin = static_cast<const char*>(from);
  out.insert(out.end(), begin, begin + bytes);
}

// The rows of one peer where one of `goes` is set.
std::vector<int64_t> Chosen(const bool* goes, int64_t count) {
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < count; ++row) {
    if (goes[row]) rows.push_back(row);
  }
  return rows;
}

// Each server's hidden states for the others. Rows received stand at the front of the results,
// peers in the order of their ranks. heads [n, n + 1]: each server's counts, and its work.
ffi::Error Dispatch(int64_t devices, ffi::Buffer<ffi::S32, 0> device,
                    ffi::Buffer<ffi::S32, 0> work, ffi::Buffer<ffi::PRED, 2> goes,
                    ffi::AnyBuffer expert_ngk, ffi::RemainingArgs columns,
                    ffi::ResultBuffer<ffi::S32, 2> heads, ffi::Result<ffi::AnyBuffer> got_expert,
                    ffi::RemainingRets got_columns) {
  const int64_t servers = goes.dimensions()[0], count = goes.dimensions()[1];
  const auto links = Current(servers);
  if (links == nullptr) return ffi::Error::Internal("the links between servers are not open");
  const int rank = links->rank;
  const Column expert = ColumnOf(expert_ngk, 2);
  std::vector<Column> sources = ColumnsOf(columns, 1), targets = ColumnsOf(got_columns, 1);
  sources.insert(sources.begin(), expert);
  targets.insert(targets.begin(), ColumnOf(got_expert, 1));

  auto known = [&](int64_t n) { return heads->typed_data() + n * (servers + 1); };
  const size_t known_bytes = sizeof(int32_t) * (servers + 1);
  std::vector<std::vector<int64_t>> chosen(servers);
  for (int64_t n = 0; n < servers; ++n) {
    chosen[n] = Chosen(goes.typed_data() + n * count, count);
    known(rank)[n] = chosen[n].size();
  }
  known(rank)[servers] = *work.typed_data();

  auto call = [&] {
    const Head head{kMagic, ++links->exchange, kDispatch, Width(sources)};
    for (int64_t n = 0; n < servers; ++n) {
      if (n == rank) continue;
      Peer& peer = links->peers[n];
      peer.out.clear();
      Append(peer.out, &head, sizeof(head));
      Append(peer.out, known(rank), known_bytes);
      sources[0].data = expert.data + n * count * expert.width;
      for (const Column& column : sources) {
        for (int64_t row : chosen[n]) Append(peer.out, column.row(row), column.width);
      }
      peer.in.resize(sizeof(Head) + known_bytes);
    }
    int64_t left = got_expert->dimensions()[0];
    auto rows_from = [&](const Peer& peer) -> int64_t {
      int32_t rows;
      std::memcpy(&rows, peer.in.data() + sizeof(Head) + sizeof(rows) * rank, sizeof(rows));
      if (rows < 0 || rows > left) return -1;
      left -= rows;
      return rows;
    };
    return Transfer(*links, head, sizeof(Head) + known_bytes, rows_from).Run();
  };
  auto use = [&] {
    int64_t first = 0;
    for (int64_t n = 0; n < servers; ++n) {
      if (n == rank) continue;
      const char* from = links->peers[n].in.data() + sizeof(Head);
      std::memcpy(known(n), from, known_bytes);
      from += known_bytes;
      const int64_t rows = known(n)[rank];
      for (const Column& column : targets) {
        std::memcpy(column.row(first), from, rows * column.width);
        from += rows * column.width;
      }
      first += rows;
    }
  };
  return Together(*links, *device.typed_data(), devices, call, use);
}

// The sums of the rows that a dispatch brought go back from the gateway, those of the rows it took
// come: each to the place of its row.
ffi::Error Return(int64_t devices, ffi::Buffer<ffi::S32, 0> device,
                  ffi::Buffer<ffi::PRED, 2> goes, ffi::Buffer<ffi::S32, 2> rows,
                  ffi::RemainingArgs sums, ffi::RemainingRets got_sums) {
  const int64_t servers = goes.dimensions()[0], count = goes.dimensions()[1];
  const auto links = Current(servers);
  if (links == nullptr) return ffi::Error::Internal("the links between servers are not open");
  const int rank = links->rank;
  const std::vector<Column> sources = ColumnsOf(sums, 1), targets = ColumnsOf(got_sums, 2);
  auto between = [&](int64_t from, int64_t to) { return rows.typed_data()[from * servers + to]; };

  auto call = [&] {
    const Head head{kMagic, links->exchange, kReturn, Width(sources)};
    int64_t first = 0;
    for (int64_t n = 0; n < servers; ++n) {
      if (n == rank) continue;
      Peer& peer = links->peers[n];
      const int64_t came = between(n, rank);
      peer.out.clear();
      if (came > 0) Append(peer.out, &head, sizeof(head));
      for (const Column& part : sources) Append(peer.out, part.row(first), came * part.width);
      first += came;
      peer.in.resize(between(rank, n) > 0 ? sizeof(Head) : 0);
    }
    auto rows_from = [&](const Peer& peer) { return between(rank, &peer - &links->peers[0]); };
    return Transfer(*links, head, sizeof(Head), rows_from).Run();
  };
  auto use = [&] {
    for (int64_t n = 0; n < servers; ++n) {
      if (n == rank) continue;
      const char* from = links->peers[n].in.data() + sizeof(Head);
      const std::vector<int64_t> places = Chosen(goes.typed_data() + n * count, count);
      for (const Column& column : targets) {
        for (int64_t row : places) {
          std::memcpy(column.row(n * count + row), from, column.width);
          from += column.width;
        }
      }
    }
  };
  return Together(*links, *device.typed_data(), devices, call, use);
}

auto DispatchBinding() {
  return ffi::Ffi::Bind()
      .Attr<int64_t>("devices")
      .Arg<ffi::Buffer<ffi::S32, 0>>()
      .Arg<ffi::Buffer<ffi::S32, 0>>()
      .Arg<ffi::Buffer<ffi::PRED, 2>>()
      .Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .Ret<ffi::Buffer<ffi::S32, 2>>()
      .Ret<ffi::AnyBuffer>()
      .RemainingRets();
}

auto ReturnBinding() {
  return ffi::Ffi::Bind()
      .Attr<int64_t>("devices")
      .Arg<ffi::Buffer<ffi::S32, 0>>()
      .Arg<ffi::Buffer<ffi::PRED, 2>>()
      .Arg<ffi::Buffer<ffi::S32, 2>>()
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(LinksDispatch, Dispatch, DispatchBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(LinksReturn, Return, ReturnBinding());

// What links_cpu.py calls.

// Takes over connected, non-blocking sockets by rank (this server's own: -1), in place of those
// that were open before.
extern "C" void LinksOpen(int rank, int servers, const int* fds, const char* const* names) {
  auto links = std::make_shared<Links>(servers);
  links->rank = rank;
  for (int n = 0; n < servers; ++n) {
    links->peers[n].name = names[n];
    links->peers[n].fd = fds[n];
  }
  std::lock_guard<std::mutex> lock(open_mutex);
  open_links = std::move(links);
}

// A call that is under way fails.
extern "C" void LinksClose() {
  std::lock_guard<std::mutex> lock(open_mutex);
  const auto links = std::move(open_links);
  if (links == nullptr) return;
  std::lock_guard<std::mutex> inner(links->mutex);
  links->Break("the links between servers were closed");
}

// timing [2, kSums]: of dispatches, of returns. bytes [servers, 2]: payload to and from each.
extern "C" void LinksCounters(int servers, double* timing, int64_t* bytes) {
  const auto links = Current(servers);
  if (links == nullptr) return;
  for (const Timing& phase : links->timing) timing = std::copy(phase, phase + kSums, timing);
  for (const Peer& peer : links->peers) {
    *bytes++ = peer.bytes_sent;
    *bytes++ = peer.bytes_received;
  }
}

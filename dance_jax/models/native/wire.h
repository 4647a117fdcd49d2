// What servers say to each other: expert calls and their answers, and the connections that carry them.

#pragma once

#include <poll.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

namespace dance {

// How hidden states travel: as they are, rounded to bfloat16, or to eight bits with a scale of a row.
enum class WireKind : int32_t { kFloat32, kBfloat16, kInt8 };

struct Wire {
  WireKind kind;
  int64_t d;
  int64_t experts;  // of a layer

  size_t RowBytes() const;
  // Weights travel in sixteen bits where rows do not travel in float32.
  size_t WeightBytes() const { return kind == WireKind::kFloat32 ? sizeof(float) : sizeof(uint16_t); }
  void EncodeWeight(float weight, char* to) const;
  float DecodeWeight(const char* from) const;
  // Of an expert's number in a call, the low byte first.
  size_t NumberBytes() const { return experts <= 256 ? 1 : 2; }
  void Encode(const float* row, char* to) const;
  void Decode(const char* row, float* to) const;
  // What experts of this very server see of `count` numbers of rows or weights: what those of others
  // would, but for eight bits.
  void Round(const float* from, int64_t count, float* to) const;
};

// The kinds of messages.
enum class MessageKind : uint16_t { kCall = 1, kAnswer = 2 };

// Before an expert call: `rows` counts of a byte each, `pairs` experts and as many weights, then the
// rows, all as Wire has it.
struct CallHead {
  static constexpr uint32_t kMagic = 0x63786a64;
  uint32_t magic = kMagic;
  MessageKind kind = MessageKind::kCall;
  uint16_t layer = 0;
  uint64_t id = 0;
  // Of the caller, whose trace knows the requests that are in it.
  int64_t step = 0;
  uint32_t rows = 0, pairs = 0;

  // It may be a call of so many rows at most. A count has one byte, so pairs are bounded as well.
  bool Sane(uint32_t most) const {
    return magic == kMagic && kind == MessageKind::kCall && rows <= most &&
           pairs <= uint64_t{rows} * UINT8_MAX;
  }
  size_t BodyBytes(const Wire& wire) const {
    return rows * (1 + wire.RowBytes()) + pairs * (wire.NumberBytes() + wire.WeightBytes());
  }
};

// Done: sums of all rows, but for the experts that are missing; not here: nothing of it is.
enum class Status : uint16_t { kDone = 0, kNotHere = 1 };

// Before an answer: `rows` sums of d float32, then `missing` experts of two bytes.
struct AnswerHead {
  static constexpr uint32_t kMagic = 0x61786a64;
  uint32_t magic = kMagic;
  MessageKind kind = MessageKind::kAnswer;
  Status status = Status::kDone;
  uint64_t id = 0;
  // Of the callee's table.
  int64_t version = 0;
  uint32_t rows = 0;
  // How long the call waited there, and was computed.
  uint32_t queued_us = 0, computed_us = 0;
  // Experts that the call wanted and that are not here.
  uint32_t missing = 0;

  bool Sane(uint32_t most) const {
    return magic == kMagic && kind == MessageKind::kAnswer && rows <= most && missing <= UINT16_MAX + 1;
  }
  size_t BodyBytes(const Wire& wire) const {
    return rows * wire.d * sizeof(float) + missing * sizeof(uint16_t);
  }
};

// A connection between two servers; one thread's.
class Channel {
 public:
  explicit Channel(int fd) : fd_(fd) {}
  Channel(const Channel&) = delete;
  ~Channel();

  int fd() const { return fd_; }
  bool closed() const { return closed_; }
  // Something waits until the connection takes it.
  bool sending() const { return !out_.empty(); }
  // Messages that the connection has not taken.
  size_t unsent() const { return out_.size(); }
  short Events(bool reads) const { return (reads ? POLLIN : 0) | (sending() ? POLLOUT : 0); }
  // Sends what it can of this message, behind those that wait.
  void Send(std::vector<char> message);
  void Flush();

  // Reads what is there and calls whole(head, body) for every message, until that says false;
  // anything but a message of `most` rows at most ends the connection.
  template <typename Head, typename Whole>
  void Read(const Wire& wire, uint32_t most, const Whole& whole) {
    while (!closed_) {
      const size_t wanted = got_ < sizeof(Head) ? sizeof(Head) : in_.size();
      if (in_.size() < wanted) in_.resize(wanted);
      if (got_ < wanted && !Receive(wanted)) return;
      Head head;
      std::memcpy(&head, in_.data(), sizeof(Head));
      if (!head.Sane(most)) {
        closed_ = true;
        return;
      }
      const size_t all = sizeof(Head) + head.BodyBytes(wire);
      in_.resize(all);
      if (got_ < all) continue;
      const bool more = whole(head, in_.data() + sizeof(Head));
      got_ = 0;
      in_.resize(sizeof(Head));
      if (!more) return;
    }
  }

 private:
  // Until `wanted` bytes are there; false: the rest has not come yet, or never will.
  bool Receive(size_t wanted);

  const int fd_;
  bool closed_ = false;
  std::vector<char> in_;
  size_t got_ = 0;
  std::deque<std::vector<char>> out_;
  size_t sent_ = 0;  // of the first one
};

int64_t NowNs();

}  // namespace dance

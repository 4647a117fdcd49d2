// Messages between servers (expert calls and their answers) and the connections that carry them.

#pragma once

#include <poll.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

namespace dance {

// How hidden states travel: as float32, rounded to bfloat16, or as eight bits with a scale per row.
enum class WireKind : int32_t { kFloat32, kBfloat16, kInt8 };

struct Wire {
  WireKind kind;
  int64_t d;
  int64_t experts;  // of a layer

  size_t RowBytes() const;
  // Weights travel in sixteen bits unless rows travel as float32.
  size_t WeightBytes() const { return kind == WireKind::kFloat32 ? sizeof(float) : sizeof(uint16_t); }
  void EncodeWeight(float weight, char* to) const;
  float DecodeWeight(const char* from) const;
  // Bytes of an expert number in a call, low byte first.
  size_t NumberBytes() const { return experts <= 256 ? 1 : 2; }
  void Encode(const float* row, char* to) const;
  void Decode(const char* row, float* to) const;
  // Rounds `count` values of rows or weights for local experts as the wire would for remote ones. kInt8
  // is the exception: local values are not rounded.
  void Round(const float* from, int64_t count, float* to) const;
};

// The kinds of messages.
enum class MessageKind : uint16_t { kCall = 1, kAnswer = 2 };

// Head of an expert call. The body: `rows` counts of one byte each, `pairs` expert numbers and as many
// weights, then the rows, all encoded by Wire.
struct CallHead {
  static constexpr uint32_t kMagic = 0x63786a64;
  uint32_t magic = kMagic;
  MessageKind kind = MessageKind::kCall;
  uint16_t layer = 0;
  uint64_t id = 0;
  // Step number of the caller; the caller's trace knows the requests in that step.
  int64_t step = 0;
  uint32_t rows = 0, pairs = 0;

  // Whether this can be a call of at most `most` rows. A count has one byte, so pairs are bounded too.
  bool Sane(uint32_t most) const {
    return magic == kMagic && kind == MessageKind::kCall && rows <= most &&
           pairs <= uint64_t{rows} * UINT8_MAX;
  }
  size_t BodyBytes(const Wire& wire) const {
    return rows * (1 + wire.RowBytes()) + pairs * (wire.NumberBytes() + wire.WeightBytes());
  }
};

// kDone: sums of all rows, without the missing experts. kNotHere: none of the experts is here.
enum class Status : uint16_t { kDone = 0, kNotHere = 1 };

// Head of an answer. The body: `rows` sums of d float32, then `missing` expert numbers of two bytes.
struct AnswerHead {
  static constexpr uint32_t kMagic = 0x61786a64;
  uint32_t magic = kMagic;
  MessageKind kind = MessageKind::kAnswer;
  Status status = Status::kDone;
  uint64_t id = 0;
  // Version of the callee's table.
  int64_t version = 0;
  uint32_t rows = 0;
  // Microseconds that the call waited at the callee, and that computing it took.
  uint32_t queued_us = 0, computed_us = 0;
  // Number of the call's experts that the callee does not hold.
  uint32_t missing = 0;

  bool Sane(uint32_t most) const {
    return magic == kMagic && kind == MessageKind::kAnswer && rows <= most && missing <= UINT16_MAX + 1;
  }
  size_t BodyBytes(const Wire& wire) const {
    return rows * wire.d * sizeof(float) + missing * sizeof(uint16_t);
  }
};

// A connection between two servers. Used by one thread at a time.
class Channel {
 public:
  explicit Channel(int fd) : fd_(fd) {}
  Channel(const Channel&) = delete;
  ~Channel();

  int fd() const { return fd_; }
  bool closed() const { return closed_; }
  // Whether messages wait until the connection accepts them.
  bool sending() const { return !out_.empty(); }
  // Number of messages that the connection has not accepted.
  size_t unsent() const { return out_.size(); }
  short Events(bool reads) const { return (reads ? POLLIN : 0) | (sending() ? POLLOUT : 0); }
  // Queues the message behind those that wait, and sends as much as possible.
  void Send(std::vector<char> message);
  void Flush();

  // Reads the available bytes and calls whole(head, body) for every complete message, until `whole`
  // returns false. Anything but a message of at most `most` rows closes the connection.
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
  // Reads until `wanted` bytes are there. Returns false if the rest has not come yet, or never will.
  bool Receive(size_t wanted);

  const int fd_;
  bool closed_ = false;
  std::vector<char> in_;
  size_t got_ = 0;
  std::deque<std::vector<char>> out_;
  size_t sent_ = 0;  // bytes of the first message
};

int64_t NowNs();

}  // namespace dance

#include "wire.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <limits>
#include <utility>

namespace dance {
namespace {

#ifndef MSG_NOSIGNAL
constexpr int MSG_NOSIGNAL = 0;
#endif

// Rounds to the nearest bfloat16, ties to even. NaN stays NaN.
uint16_t ToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float FromBfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

int64_t NowNs() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

size_t Wire::RowBytes() const {
  switch (kind) {
    case WireKind::kBfloat16:
      return 2 * d;
    case WireKind::kInt8:
      return sizeof(float) + d;
    default:
      return sizeof(float) * d;
  }
}

void Wire::Encode(const float* row, char* to) const {
  if (kind == WireKind::kFloat32) {
    std::memcpy(to, row, sizeof(float) * d);
  } else if (kind == WireKind::kBfloat16) {
    for (int64_t i = 0; i < d; ++i) {
      const uint16_t half = ToBfloat16(row[i]);
      std::memcpy(to + 2 * i, &half, sizeof(half));
    }
  } else {
    float most = 0;
    bool finite = true;
    for (int64_t i = 0; i < d; ++i) {
      most = std::max(most, std::fabs(row[i]));
      finite = finite && std::isfinite(row[i]);
    }
    // Eight bits have no NaN: a NaN scale marks a row that is not finite.
    const float scale = finite ? most / 127 : NAN;
    // The reciprocal of the smallest scales is infinite.
    const float steps = scale >= std::numeric_limits<float>::min() ? 1 / scale : 0;
    std::memcpy(to, &scale, sizeof(scale));
    for (int64_t i = 0; i < d; ++i) {
      const float value = finite ? std::nearbyint(row[i] * steps) : 0;
      to[sizeof(scale) + i] = static_cast<int8_t>(value);
    }
  }
}

void Wire::Decode(const char* row, float* to) const {
  if (kind == WireKind::kFloat32) {
    std::memcpy(to, row, sizeof(float) * d);
  } else if (kind == WireKind::kBfloat16) {
    for (int64_t i = 0; i < d; ++i) {
      uint16_t half;
      std::memcpy(&half, row + 2 * i, sizeof(half));
      to[i] = FromBfloat16(half);
    }
  } else {
    float scale;
    std::memcpy(&scale, row, sizeof(scale));
    for (int64_t i = 0; i < d; ++i) to[i] = scale * static_cast<int8_t>(row[sizeof(scale) + i]);
  }
}

void Wire::EncodeWeight(float weight, char* to) const {
  if (kind == WireKind::kFloat32) {
    std::memcpy(to, &weight, sizeof(weight));
  } else {
    const uint16_t half = ToBfloat16(weight);
    std::memcpy(to, &half, sizeof(half));
  }
}

float Wire::DecodeWeight(const char* from) const {
  float weight;
  uint16_t half;
  if (kind == WireKind::kFloat32) {
    std::memcpy(&weight, from, sizeof(weight));
  } else {
    std::memcpy(&half, from, sizeof(half));
    weight = FromBfloat16(half);
  }
  return weight;
}

void Wire::Round(const float* from, int64_t count, float* to) const {
  if (kind == WireKind::kBfloat16) {
    for (int64_t i = 0; i < count; ++i) to[i] = FromBfloat16(ToBfloat16(from[i]));
  } else {
    std::copy_n(from, count, to);
  }
}

Channel::~Channel() { close(fd_); }

void Channel::Send(std::vector<char> message) {
  out_.push_back(std::move(message));
  Flush();
}

void Channel::Flush() {
  while (!out_.empty() && !closed_) {
    const std::vector<char>& message = out_.front();
    const ssize_t n = send(fd_, message.data() + sent_, message.size() - sent_, MSG_NOSIGNAL);
    if (n < 0) {
      if (errno == EINTR) continue;
      closed_ = errno != EAGAIN && errno != EWOULDBLOCK;
      return;
    }
    sent_ += n;
    if (sent_ < message.size()) continue;
    out_.pop_front();
    sent_ = 0;
  }
}

bool Channel::Receive(size_t wanted) {
  while (got_ < wanted) {
    const ssize_t n = recv(fd_, in_.data() + got_, wanted - got_, 0);
    if (n > 0) {
      got_ += n;
    } else if (n == 0 || (errno != EINTR && errno != EAGAIN && errno != EWOULDBLOCK)) {
      closed_ = true;
      return false;
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

}  // namespace dance

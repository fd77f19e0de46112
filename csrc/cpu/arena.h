// A thread's scratch, piece by piece.
#pragma once

#include "tier_headers.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// Bump allocation inside a thread's scratch; with a null base it only counts.
template <class T>
class Arena {
  public:
    explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
    T* take(int64_t count) {
        char* p = base_ == nullptr ? nullptr : base_ + used_;
        used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
        return reinterpret_cast<T*>(p);
    }
    template <class... Pointers>
    void take_each(int64_t count, Pointers&... pointers) {
        ((pointers = take(count)), ...);
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu

// Pieces of a workspace.
#pragma once

#include <cstdint>

namespace lsm {

// Hands out 256-byte aligned pieces of the workspace; with a null base it measures.
class Carver {
  public:
    explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

    template <class T>
    T* take(int64_t count) {
        char* const at = base_ + used_;
        used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
        return reinterpret_cast<T*>(at);
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

}  // namespace lsm

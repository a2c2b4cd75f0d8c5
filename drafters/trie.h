// A session's own text: how often each run of tokens occurs in it (ngram_index.py).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int kNone = -1;
constexpr int kRoot = 0;

struct TrieNode {
    int32_t token, first_child, sibling;
    int64_t count;     // occurrences of the run this node stands for
    int64_t followed;  // of those, how many a token followed: the sum of the children's counts
};

class Trie {
  public:
    explicit Trie(int query) : window_(query + 1), nodes_(1, TrieNode{kNone, kNone, kNone, 0, 0}), slots_(1024, kNone) {}

    void append(int32_t token) {
        const int open = std::min<int>(window_ - 1, static_cast<int>(cursors_.size()));
        std::vector<int32_t> next(open + 1);
        for (int i = 0; i <= open; ++i) {
            const int32_t parent = i == 0 ? kRoot : cursors_[i - 1];
            next[i] = child_or_new(parent, token);
            ++nodes_[parent].followed;
            ++nodes_[next[i]].count;
        }
        cursors_.swap(next);
    }

    int32_t child(int32_t parent, int32_t token) const { return slots_[slot_of(parent, token)]; }

    // The run of the text's newest `length` tokens.
    int32_t newest(int length) const { return length <= int(cursors_.size()) ? cursors_[length - 1] : kNone; }
    const TrieNode& operator[](int32_t node) const { return nodes_[node]; }

  private:
    size_t slot_of(int32_t parent, int32_t token) const {
        const uint64_t key = (static_cast<uint64_t>(parent) << 32) | static_cast<uint32_t>(token);
        const size_t mask = slots_.size() - 1;
        size_t slot = (key * 0x9E3779B97F4A7C15ull) >> 24 & mask;
        while (slots_[slot] != kNone && !(parents_[slots_[slot]] == parent && nodes_[slots_[slot]].token == token)) {
            slot = (slot + 1) & mask;
        }
        return slot;
    }

    int32_t child_or_new(int32_t parent, int32_t token) {
        const size_t slot = slot_of(parent, token);
        if (slots_[slot] != kNone) return slots_[slot];
        const auto node = static_cast<int32_t>(nodes_.size());
        nodes_.push_back({token, kNone, nodes_[parent].first_child, 0, 0});
        parents_.push_back(parent);
        nodes_[parent].first_child = node;
        slots_[slot] = node;
        if (nodes_.size() * 2 > slots_.size()) rehash();
        return node;
    }

    void rehash() {
        slots_.assign(slots_.size() * 2, kNone);
        for (int32_t node = 1; node < static_cast<int32_t>(nodes_.size()); ++node) {
            slots_[slot_of(parents_[node], nodes_[node].token)] = node;
        }
    }

    int window_;
    std::vector<TrieNode> nodes_;
    std::vector<int32_t> parents_{kNone};
    std::vector<int32_t> slots_;
    std::vector<int32_t> cursors_;  // nodes of the text's last 1, 2, ... window tokens
};

}  // namespace

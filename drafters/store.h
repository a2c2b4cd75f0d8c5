// Text stores and binary search in their suffix arrays (datastore.py).
#pragma once

#include <cstdint>

#include "trie.h"

extern "C" {

struct Store {
    const void* text;         // size ids of 2 bytes, or 4 where wide; a document ends with the id vocab
    const int32_t* starts;    // vocab + 2: ranks of the first suffix that begins with each id
    const int32_t* suffixes;  // size positions, ordered by what follows
    const int32_t* common;    // num_common ids, with their share of the text
    const double* shares;
    int64_t size, number;     // the number tells stores apart, wherever they lie
    int32_t vocab, wide, num_common;
};

}  // extern "C"

namespace {

constexpr int kMaxQuery = 8;
constexpr int kMaxStores = 2;

struct Range {
    int64_t low, high;
    int64_t size() const { return high - low; }
};

int32_t token_at(const Store& store, int64_t position) {
    if (position >= store.size) return kNone;
    return store.wide ? static_cast<const int32_t*>(store.text)[position]
                      : static_cast<const uint16_t*>(store.text)[position];
}

// A binary search of a range of suffixes, which share their first `length` tokens, for the first that goes on with
// `token` or more. `at`: its rank, once nothing is left.
struct Search {
    const Store* store;
    int64_t at, left;
    int32_t length, token;
};

// All of them a step at a time, so that they wait for memory together and not one after the other.
void find(Search* searches, int count) {
    int32_t suffixes[2 * kMaxStores * kMaxQuery];
    for (bool more = true; more;) {
        for (int i = 0; i < count; ++i) {
            const Search& s = searches[i];
            suffixes[i] = s.left ? s.store->suffixes[s.at + s.left / 2] : 0;
        }
        more = false;
        for (int i = 0; i < count; ++i) {
            Search& s = searches[i];
            if (!s.left) continue;
            const bool below = token_at(*s.store, int64_t(suffixes[i]) + s.length) < s.token;
            const int64_t half = s.left / 2;
            s.at += below ? half + 1 : 0;
            s.left = below ? s.left - half - 1 : half;
            more |= s.left > 0;
        }
    }
}

}  // namespace

// SSSD's hot path: a session's own n-gram counts, look-up in suffix arrays, and the best-first tree over both.
//
// The readable form of the same rules, with the same arithmetic in the same order, is ngram_index.py, datastore.py and
// expand in sssd.py; tests compare the two tree by tree. Called through ctypes (sssd_native.py), from one thread per
// session index.

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace {

constexpr int kMaxQuery = 8;
constexpr int kMaxStores = 2;
constexpr int kMaxSamples = 256;
constexpr int kNone = -1;
constexpr int kRoot = 0;

// --- a session's own text

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

// --- text stores

struct Range {
    int64_t low, high;
    int64_t size() const { return high - low; }
};

}  // namespace

extern "C" {

struct Store {
    const void* text;         // size ids of 2 bytes, or 4 where wide; a document ends with the id vocab
    const int32_t* starts;    // vocab + 2: ranks of the first suffix that begins with each id
    const int32_t* suffixes;  // size positions, ordered by what follows
    const int32_t* common;    // num_common ids, with their share of the text
    const double* shares;
    int64_t size;
    int32_t vocab, wide, num_common;
};

struct Rules {
    int32_t query, samples;
    double own_weight, store_cap, prior, negligible;
    int32_t chain;  // only the likeliest follower of each node
    int32_t outcome_samples;
    double beside;
};

}  // extern "C"

namespace {

int32_t token_at(const Store& store, int64_t position) {
    if (position >= store.size) return kNone;
    return store.wide ? static_cast<const int32_t*>(store.text)[position]
                      : static_cast<const uint16_t*>(store.text)[position];
}

// Of the suffixes in range, which share their first `length` tokens, those that go on with `token`.
Range narrow(const Store& store, Range range, int length, int32_t token) {
    if (token >= store.vocab || range.size() <= 0) return {0, 0};
    if (length == 0) return {store.starts[token], store.starts[token + 1]};
    const int32_t* first = store.suffixes + range.low;
    const int32_t* last = store.suffixes + range.high;
    const auto below = [&](int32_t suffix, int32_t wanted) { return token_at(store, int64_t(suffix) + length) < wanted; };
    first = std::lower_bound(first, last, token, below);
    int64_t step = 1;  // most matches are few: look close by before halving what is left
    while (step < last - first && below(first[step - 1], token + 1)) step *= 2;
    last = std::lower_bound(first + step / 2, std::min(first + step, last), token + 1, below);
    return {first - store.suffixes, last - store.suffixes};
}

// --- the tree

struct State {  // what matches the newest 1, 2, ... query tokens
    int32_t own[kMaxQuery];
    Range stores[kMaxStores][kMaxQuery];
};

struct Candidate {
    double rank, score;  // the rank is the score but for an outcome's first follower
    int32_t parent, token, depth;
    bool operator<(const Candidate& other) const {  // better first
        if (rank != other.rank) return rank > other.rank;
        return parent != other.parent ? parent < other.parent : token < other.token;
    }
};

class Grower {
  public:
    Grower(const Trie& own, const Store* stores, int num_stores, const Rules& rules)
        : own_(own), stores_(stores), num_stores_(num_stores), rules_(rules) {}

    State empty() const {
        State state;
        std::fill(state.own, state.own + kMaxQuery, kNone);
        std::fill(&state.stores[0][0], &state.stores[0][0] + kMaxStores * kMaxQuery, Range{0, 0});
        return state;
    }

    State step(const State& from, int32_t token) const {
        State to = empty();
        for (int k = 0; k < rules_.query; ++k) {
            const int32_t node = k == 0 ? kRoot : from.own[k - 1];
            to.own[k] = node == kNone ? kNone : own_.child(node, token);
            for (int s = 0; s < num_stores_; ++s) {
                const Range range = k == 0 ? Range{0, stores_[s].size} : from.stores[s][k - 1];
                to.stores[s][k] = narrow(stores_[s], range, k, token);
            }
        }
        return to;
    }

    // (token, probability) of what may follow, in order of token. Runs that can give less than `floor` are left out.
    const std::vector<std::pair<int32_t, double>>& followers(const State& state, double floor, int samples) {
        found_.clear();
        double weight = 1.0;
        for (int k = rules_.query - 1; k >= 0 && weight >= floor; --k) {
            const int64_t own = state.own[k] == kNone ? 0 : own_[state.own[k]].followed;
            double total = rules_.own_weight * own;
            for (int s = 0; s < num_stores_; ++s) total += std::min<double>(state.stores[s][k].size(), rules_.store_cap);
            if (total == 0.0) continue;
            const double each = weight / (total + rules_.prior);
            if (own) add_own(state.own[k], each * rules_.own_weight);
            for (int s = 0; s < num_stores_; ++s) add_store(stores_[s], state.stores[s][k], k + 1, each, samples);
            weight = each * rules_.prior;
        }
        if (num_stores_ && weight >= floor) {
            for (int i = 0; i < stores_[0].num_common; ++i) {
                found_.emplace_back(stores_[0].common[i], weight * stores_[0].shares[i]);
            }
        }
        sum_up();
        return found_;
    }

  private:
    void add_own(int32_t node, double each) {
        for (int32_t child = own_[node].first_child; child != kNone; child = own_[child].sibling) {
            found_.emplace_back(own_[child].token, each * own_[child].count);
        }
    }

    // Counts by evenly spaced ranks: the suffixes are in order of what follows, so equal tokens stand together.
    void add_store(const Store& store, Range range, int length, double each, int samples) {
        const int64_t size = range.size();
        if (size <= 0) return;
        const int64_t taken = std::min<int64_t>({size, samples, kMaxSamples});
        each *= std::min<double>(size, rules_.store_cap) / taken;
        int32_t tokens[kMaxSamples];
        for (int64_t i = 0; i < taken; ++i) {
            const int64_t rank = range.low + (2 * i + 1) * size / (2 * taken);
            tokens[i] = token_at(store, int64_t(store.suffixes[rank]) + length);
        }
        for (int64_t i = 0, end; i < taken; i = end) {
            for (end = i + 1; end < taken && tokens[end] == tokens[i];) ++end;
            if (tokens[i] >= 0 && tokens[i] < store.vocab) found_.emplace_back(tokens[i], each * (end - i));
        }
    }

    void sum_up() {
        std::stable_sort(found_.begin(), found_.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
        size_t kept = 0;
        for (size_t i = 0; i < found_.size(); ++i) {
            if (kept && found_[kept - 1].first == found_[i].first) {
                found_[kept - 1].second += found_[i].second;
            } else {
                found_[kept++] = found_[i];
            }
        }
        found_.resize(kept);
    }

    const Trie& own_;
    const Store* stores_;
    int num_stores_;
    const Rules& rules_;
    std::vector<std::pair<int32_t, double>> found_;
};

// The best candidates, at most as many as the tree has room for.
class Frontier {
  public:
    explicit Frontier(int room) : room_(room) { best_.reserve(room + 1); }

    bool takes(double rank) const { return int(best_.size()) < room_ || (room_ && rank > best_.back().rank); }

    void offer(const Candidate& candidate) {
        const auto place = std::upper_bound(best_.begin(), best_.end(), candidate);
        if (place == best_.end() && int(best_.size()) >= room_) return;
        best_.insert(place, candidate);
        if (int(best_.size()) > room_) best_.pop_back();
    }

    bool empty() const { return best_.empty(); }

    Candidate pop() {
        const Candidate best = best_.front();
        best_.erase(best_.begin());
        --room_;
        return best;
    }

  private:
    int room_;
    std::vector<Candidate> best_;
};

}  // namespace

extern "C" {

void* trie_new(int32_t query) { return new Trie(query); }
void trie_free(void* trie) { delete static_cast<Trie*>(trie); }

void trie_extend(void* trie, const int32_t* tokens, int64_t count) {
    for (int64_t i = 0; i < count; ++i) static_cast<Trie*>(trie)->append(tokens[i]);
}

// The best-first tree behind `tail`, the text's newest tokens. With `outcomes`, only nodes of the best path have more than
// one follower. tokens, parents, scores: (max_nodes,), filled in the order of ranks. Returns the number of nodes.
int32_t grow(const void* trie, const Store* stores, int32_t num_stores, const Rules* rules, const int32_t* tail,
             int32_t tail_length, int32_t max_nodes, int32_t max_depth, int32_t outcomes, int32_t* tokens,
             int32_t* parents, float* scores) {
    Grower grower(*static_cast<const Trie*>(trie), stores, num_stores, *rules);
    std::vector<State> states(1, grower.empty());  // the root's, then each node's; empty where it needs none
    for (int32_t i = 0; i < tail_length; ++i) states[0] = grower.step(states[0], tail[i]);
    Frontier frontier(max_nodes);
    int32_t end = -1;           // of the best path
    std::vector<bool> on_path{true};  // whether it is on that path: the root, then each node
    const auto offer = [&](int32_t parent, int32_t depth, double rank, double score, bool beside) {
        const double floor = beside ? rules->beside : rules->negligible / score;
        const int samples = outcomes && !beside ? rules->outcome_samples : rules->samples;
        const auto& found = grower.followers(states[parent + 1], floor, samples);
        const auto likelier = [](const auto& a, const auto& b) { return a.second < b.second; };
        auto first = found.begin(), last = found.end();
        if ((rules->chain || beside) && first != last) first = std::max_element(first, last, likelier), last = first + 1;
        for (; first != last; ++first) {
            const double share = std::min(score, score * first->second);
            frontier.offer({rank < 0.0 ? share : rank, share, parent, first->first, depth});
        }
    };
    offer(-1, 1, -1.0, 1.0, false);
    int32_t count = 0;
    for (; !frontier.empty(); ++count) {
        const Candidate best = frontier.pop();
        tokens[count] = best.token;
        parents[count] = best.parent;
        scores[count] = static_cast<float>(best.score);
        const bool beside = outcomes && best.parent != end, outcome = beside && on_path[best.parent + 1];
        on_path.push_back(!beside);
        if (!beside) end = count;
        const bool pays = best.depth < max_depth && frontier.takes(best.rank);
        states.push_back(pays ? grower.step(states[best.parent + 1], best.token) : State{});
        // An outcome is worth its row only with something below it: its first follower ranks as it does.
        if (pays) offer(count, best.depth + 1, outcome ? best.rank : -1.0, best.score, beside);
    }
    return count;
}

}  // extern "C"

// SSSD's hot path: a session's own n-gram counts, look-up in suffix arrays, and the best-first tree over both.
//
// The readable form of the same rules, with the same arithmetic in the same order, is ngram_index.py, datastore.py and
// ngram_tree.py; tests compare the two tree by tree. Called through ctypes (sssd_native.py), from one thread per session
// index. Stores are larger than caches, and a step of the target has just taken what there is of these: what counts is
// how many reads wait for each other.

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "store.h"
#include "trie.h"

extern "C" {

struct Rules {
    int32_t query, samples;
    double own_weight, store_cap, prior, negligible;
    int32_t chain;  // only the likeliest follower of each node
    int32_t outcome_samples;
    double beside;
};

}  // extern "C"

namespace {

constexpr int kMaxSamples = 256;

struct State {  // what matches the newest 1, 2, ... query tokens
    State() {
        std::fill(own, own + kMaxQuery, kNone);
        std::fill(&stores[0][0], &stores[0][0] + kMaxStores * kMaxQuery, Range{0, 0});
    }

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

struct Follower {
    int32_t token;
    double probability;
};

// Probabilities summed up by token, in the order in which they come.
class Followers {
  public:
    void add(int32_t token, double probability) {
        Slot& slot = slot_of(token);
        if (slot.round == round_) {
            all_[slot.index].probability += probability;
            return;
        }
        slot = {round_, static_cast<int32_t>(all_.size())};
        all_.push_back({token, probability});
        if (all_.size() * 2 > slots_.size()) {
            slots_.assign(slots_.size() * 2, Slot{0, 0});
            for (size_t i = 0; i < all_.size(); ++i) slot_of(all_[i].token) = {round_, static_cast<int32_t>(i)};
        }
    }

    void clear() {
        all_.clear();
        ++round_;
    }

    const std::vector<Follower>& all() const { return all_; }

  private:
    struct Slot {
        uint32_t round;  // in which it was filled: it is empty in others
        int32_t index;
    };

    Slot& slot_of(int32_t token) {
        const size_t mask = slots_.size() - 1;
        size_t slot = (static_cast<uint32_t>(token) * 0x9E3779B9u) >> 8 & mask;
        while (slots_[slot].round == round_ && all_[slots_[slot].index].token != token) slot = (slot + 1) & mask;
        return slots_[slot];
    }

    uint32_t round_ = 1;
    std::vector<Follower> all_;
    std::vector<Slot> slots_ = std::vector<Slot>(512, Slot{0, 0});
};

class Grower {
  public:
    Grower(const Trie& own, const Store* stores, int num_stores, const Rules& rules)
        : own_(own), stores_(stores), num_stores_(num_stores), rules_(rules) {}

    State step(const State& from, int32_t token) const {
        State to;
        Search searches[2 * kMaxStores * kMaxQuery];
        Range* found[kMaxStores * kMaxQuery];
        int count = 0;
        for (int k = 0; k < rules_.query; ++k) {
            const int32_t node = k == 0 ? kRoot : from.own[k - 1];
            to.own[k] = node == kNone ? kNone : own_.child(node, token);
        }
        for (int s = 0; s < num_stores_; ++s) {
            const Store& store = stores_[s];
            const bool known = token < store.vocab;
            to.stores[s][0] = known ? Range{store.starts[token], store.starts[token + 1]} : Range{0, 0};
            for (int k = 1; k < rules_.query; ++k) {
                const Range range = from.stores[s][k - 1];
                to.stores[s][k] = {0, 0};
                if (!known || range.size() <= 0) continue;
                found[count / 2] = &to.stores[s][k];
                for (int bound = 0; bound < 2; ++bound) searches[count++] = {&store, range.low, range.size(), k, token + bound};
            }
        }
        find(searches, count);
        for (int i = 0; i < count; i += 2) *found[i / 2] = {searches[i].at, searches[i + 1].at};
        return to;
    }

    // (token, probability) of what may follow. Runs that can give less than `floor` are left out.
    const std::vector<Follower>& followers(const State& state, double floor, int samples) {
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
            for (int i = 0; i < stores_[0].num_common; ++i) found_.add(stores_[0].common[i], weight * stores_[0].shares[i]);
        }
        return found_.all();
    }

  private:
    void add_own(int32_t node, double each) {
        for (int32_t child = own_[node].first_child; child != kNone; child = own_[child].sibling) {
            found_.add(own_[child].token, each * own_[child].count);
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
            if (tokens[i] >= 0 && tokens[i] < store.vocab) found_.add(tokens[i], each * (end - i));
        }
    }

    const Trie& own_;
    const Store* stores_;
    int num_stores_;
    const Rules& rules_;
    Followers found_;
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

// A session's text: its runs, and where its newest tokens lead in the stores. These are followed from round to round.
class Text {
  public:
    explicit Text(int query) : query_(query), trie_(query) {}

    const Trie& trie() const { return trie_; }

    void append(int32_t token) {
        trie_.append(token);
        newest_.push_back(token);
        if (int(newest_.size()) > query_) newest_.erase(newest_.begin());
        ++behind_;
    }

    const State& root(const Grower& grower, const Store* stores, int num_stores) {
        std::array<int64_t, kMaxStores> numbers;
        numbers.fill(kNone);
        for (int s = 0; s < num_stores; ++s) numbers[s] = stores[s].number;
        if (numbers != numbers_ || behind_ > int(newest_.size())) {
            root_ = State();
            numbers_ = numbers;
            behind_ = static_cast<int>(newest_.size());
        }
        for (; behind_; --behind_) root_ = grower.step(root_, newest_[newest_.size() - behind_]);
        for (int k = 0; k < query_; ++k) root_.own[k] = trie_.newest(k + 1);  // also runs that were new a step ago
        return root_;
    }

  private:
    int query_;
    Trie trie_;
    std::vector<int32_t> newest_;
    State root_;
    std::array<int64_t, kMaxStores> numbers_{kNone, kNone};  // of the stores that root_ is about
    int behind_ = 0;                // tokens it has not seen
};

}  // namespace

extern "C" {

void* text_new(int32_t query) { return new Text(query); }
void text_free(void* text) { delete static_cast<Text*>(text); }

void text_extend(void* text, const int32_t* tokens, int64_t count) {
    for (int64_t i = 0; i < count; ++i) static_cast<Text*>(text)->append(tokens[i]);
}

// The best-first tree behind the text. With `outcomes`, only nodes of the best path have more than one follower. `least`:
// nodes of a lower score are left out. tokens, parents, scores: (max_nodes,), filled in the order of ranks. Returns the
// number of nodes.
int32_t grow(void* text, const Store* stores, int32_t num_stores, const Rules* rules, int32_t max_nodes, int32_t max_depth,
             int32_t outcomes, double least, int32_t* tokens, int32_t* parents, float* scores) {
    Text& own = *static_cast<Text*>(text);
    Grower grower(own.trie(), stores, num_stores, *rules);
    std::vector<State> states{own.root(grower, stores, num_stores)};  // then each node's; empty where it needs none
    Frontier frontier(max_nodes);
    int32_t end = -1;                 // of the best path
    std::vector<bool> on_path{true};  // whether it is on that path: the root, then each node
    const auto offer = [&](int32_t parent, int32_t depth, double rank, double score, bool beside) {
        const double floor = beside ? rules->beside : std::max(rules->negligible, least) / score;
        const int samples = outcomes && !beside ? rules->outcome_samples : rules->samples;
        const auto& found = grower.followers(states[parent + 1], floor, samples);
        const auto likelier = [](const Follower& a, const Follower& b) {
            return a.probability != b.probability ? a.probability > b.probability : a.token < b.token;
        };
        auto first = found.begin(), last = found.end();
        if ((rules->chain || beside) && first != last) first = std::min_element(first, last, likelier), last = first + 1;
        for (; first != last; ++first) {
            const double share = std::min(score, score * first->probability);
            if (share >= least) frontier.offer({rank < 0.0 ? share : rank, share, parent, first->token, depth});
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
        states.push_back(pays ? grower.step(states[best.parent + 1], best.token) : State());
        // An outcome is worth its row only with something below it: its first follower ranks as it does.
        if (pays) offer(count, best.depth + 1, outcome ? best.rank : -1.0, best.score, beside);
    }
    return count;
}

}  // extern "C"

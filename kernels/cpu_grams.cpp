// N-grams of growing token sequences: those that came are indexed, and of the newest tokens it is told how many stood
// together before, and what followed. Tables, hash and search are those of speculation/ngram.py, call by call: either
// may go on where the other left off. A microsecond for a sequence, where Python's calls take a dozen.
#include <algorithm>
#include <cstdint>

namespace quire {

// Of N slots.
struct Grams {
  const int32_t* tokens;     // [N, length]
  const int32_t* known;      // [N]: tokens of each
  int32_t *newest, *older;   // [2, N, buckets], [2, N, length]: positions of grams' last tokens from 1, 0: none
  int32_t* size;             // [N]: tokens that are indexed
  long slots, length, buckets, shift, candidates, enough, most;
  long orders[2];            // tokens of a gram, the more first
};

namespace {

constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15;

uint64_t bucket(const Grams& g, const int32_t* last, long order) {
  uint64_t key = 0;
  for (long i = 1 - order; i <= 0; i++) key = (key + (uint64_t)last[i] + 1) * kMultiplier;
  return key >> g.shift;
}

void take_in(const Grams& g, long slot, const int32_t* view) {
  for (long end = g.size[slot]; end < g.known[slot]; end++)
    for (long i = 0; i < 2; i++) {
      if (end + 1 < g.orders[i]) continue;
      int32_t& newest = g.newest[(i * g.slots + slot) * g.buckets + bucket(g, view + end, g.orders[i])];
      g.older[(i * g.slots + slot) * g.length + end] = newest;
      newest = end + 1;
    }
  g.size[slot] = g.known[slot];
}

// Tokens, at most `enough`, that are equal going back from two positions, the first being the smaller.
long common(const Grams& g, const int32_t* view, long first, long second) {
  const long limit = std::min(g.enough, first + 1);
  long length = 0;
  while (length < limit && view[first - length] == view[second - length]) length++;
  return length;
}

// Where the longest, among equals the newest, match of the last tokens ends, and its length; 0: none.
struct Match {
  long start, length;
};

Match longest_match(const Grams& g, long slot, const int32_t* view) {
  const long last = g.known[slot] - 1;
  Match best{0, 0};
  for (long i = 0; i < 2 && best.length < g.orders[std::max(i - 1, 0L)]; i++) {
    if (last + 1 < g.orders[i]) continue;
    const int32_t* older = g.older + (i * g.slots + slot) * g.length;
    long candidate = older[last] - 1;
    for (long tried = 0; tried < g.candidates && candidate >= 0; tried++, candidate = older[candidate] - 1)
      if (candidate >= best.length && view[candidate - best.length] == view[last - best.length])
        if (const long length = common(g, view, candidate, last); length > best.length) best = {candidate + 1, length};
  }
  return best.length >= g.orders[1] ? best : Match{0, 0};
}

}  // namespace
}  // namespace quire

// Takes in what is new of the slots [count], and writes for each how many of its newest tokens stood together before.
extern "C" void quire_match_grams(const quire::Grams* grams, const int32_t* slots, long count, int32_t* matched) {
  for (long i = 0; i < count; i++) {
    const int32_t* view = grams->tokens + slots[i] * grams->length;
    quire::take_in(*grams, slots[i], view);
    matched[i] = std::min(quire::longest_match(*grams, slots[i], view).length, grams->most);
  }
}

// The same, and writes for each up to `most` [count] tokens that may follow, of `tokens` [count, width], and how many.
extern "C" void quire_continue_grams(const quire::Grams* grams, const int32_t* slots, const int32_t* most, long count,
                                     int32_t* tokens, long width, int32_t* counts) {
  for (long i = 0; i < count; i++, tokens += width) {
    const int32_t* view = grams->tokens + slots[i] * grams->length;
    quire::take_in(*grams, slots[i], view);
    const quire::Match match = quire::longest_match(*grams, slots[i], view);
    // A match that reaches into its own continuation repeats with the distance as its period.
    const long distance = grams->known[slots[i]] - match.start;
    counts[i] = std::min<long>(most[i], match.length);
    for (long k = 0; k < counts[i]; k++) tokens[k] = view[match.start + k % distance];
  }
}

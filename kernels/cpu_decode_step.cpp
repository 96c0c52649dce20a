// A step in which every sequence computes its newest tokens and samples the next, in one call: inputs from the tables of
// all slots, forward pass, choice of tokens, drafts verified, and the count of new entries. The functions are those of a
// step put together in Python, so the tokens are the same; Python's share of such a step would be as long as a small
// model's arithmetic.
#include "cpu_distributions.h"
#include "cpu_kernels.h"
#include "cpu_rejection.h"
#include "cpu_rows.h"

#include <chrono>

namespace quire {
namespace {

// What is known of N slots, from step to step.
struct SlotTables {
  const int32_t* page_table;  // [N, L, K, columns]
  int32_t* kept;              // [N, L, K]
  int64_t* computed;          // [N]
  const uint8_t* closes_up;   // [N]: whether entries are rotated to their places in the cache
  const uint8_t* unaltered;   // [N]: whether tokens are drawn from the logits, masks apart, as they are from min_ends on
  const int64_t* min_ends;    // [N]
  const float* strengths;     // [N, strength_columns]: temperature (0: the likeliest token), top-p, min-p
  const int64_t* keys;        // [N, 2]: seed, top-k
  int64_t* newest;            // [N]: the token that each sampled last
  long columns, strength_columns;
};

// One step of D sequences, which bring T tokens.
struct DecodeRows {
  const int32_t *slots, *starts, *ends;  // [D]: distinct; logical positions of their first tokens; where their rows end
  const int32_t* ids;                   // [T]: tokens, -1: the slot's newest
  const int32_t* drafts;                // [D]: how many of its tokens, the last ones, are proposals
  const void *cos, *sin;                // [positions, half]
  int32_t* tokens;                      // [D, width]: what each gets; the first is -1 where logits are not finite
  int32_t* counts;                      // [D]: how many these are, where drafts are verified
  const int32_t* places;                // [T]: the row of `scaled` that a proposal was drawn from, -1: none; or null
  const float* scaled;                  // [Q, V]: scaled logits
  float* logits;                        // [R, V]: of each sequence's last known token, and of its proposals
  const int32_t* masked;                // [D]: each row's mask, -1: none
  const uint8_t* masks;                 // [masks, mask_stride]: bit t % 8 of byte t / 8: may t be drawn; null: no mask
  long count, half, positions, mask_stride, width;
  int threads, verify;                  // verify: whether drafts are, here; then all bring one token besides
  int drawn;                            // whether tokens were; if not, the logits wait for who draws
  double forward_seconds, sample_seconds;
};

enum Refusal { kNoToken = -1, kOutgrown = -2 };

constexpr float kLeastTemperature = 1e-30f;
constexpr int64_t kAcceptStream = (int64_t)2 << 40;  // as in noise.py

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

long first_row(const DecodeRows& r, long i) { return i ? r.ends[i - 1] : 0; }
long tokens_of(const DecodeRows& r, long i) { return r.ends[i] - first_row(r, i); }

// R
long wanted_rows(const DecodeRows& r) {
  long rows = r.count;
  for (long i = 0; i < r.count; i++) rows += r.drafts[i];
  return rows;
}

// Pieces of one buffer, one after another, each aligned.
class Pieces {
 public:
  explicit Pieces(char* memory) : next_(memory) {}
  char* take(long bytes) {
    char* piece = next_;
    next_ += (bytes + 63) / 64 * 64;
    return piece;
  }
  long used(const char* memory) const { return next_ - memory; }

 private:
  char* next_;
};

// Lays out what a step needs besides, from `memory` on; returns its bytes.
long lay_out(const Decoder& d, const DecodeRows& r, long pages, char* memory, DecoderStep& s, Args& a) {
  const long item = d.is_bf16 ? 2 : 4, rows = r.ends[r.count - 1], heads = d.count * a.kv_heads;
  Pieces pieces(memory);
  s.x = pieces.take(rows * d.hidden * item);
  s.heads = pieces.take(rows * a.query_stride * item);
  a.output = pieces.take(rows * a.heads * a.width * item);
  s.gated = pieces.take(rows * d.feed_forward * item);
  s.turns = pieces.take(2 * rows * r.half * item);
  s.normed = pieces.take(rows * d.hidden * item);
  s.ids = (int64_t*)pieces.take(rows * 8);
  s.angle_rows = (int64_t*)pieces.take(rows * 8);
  a.positions = (int64_t*)pieces.take(rows * 8);
  s.logit_rows = (int64_t*)pieces.take(rows * 8);
  a.query_start = (int32_t*)pieces.take((r.count + 1) * 4);
  a.kept = (int32_t*)pieces.take(r.count * heads * 4);
  a.page_table = (int32_t*)pieces.take(r.count * heads * pages * 4);
  return pieces.used(memory);
}

// Rows that are rotated to positions of which there are no angles yet: how many there should be; else 0.
long lacking_angles(const SlotTables& t, const DecodeRows& r, long heads) {
  long most = 0;
  for (long i = 0; i < r.count; i++) {
    const long slot = r.slots[i];
    most = std::max<long>(most, (t.closes_up[slot] ? t.kept[slot * heads] : r.starts[i]) + tokens_of(r, i));
  }
  return most > r.positions ? most : 0;
}

// Pages that hold the longest head once it has got its new entries.
long longest_head(const SlotTables& t, const DecodeRows& r, long heads, long page_size) {
  long most = 0;
  for (long i = 0; i < r.count; i++) {
    const int32_t* kept = t.kept + r.slots[i] * heads;
    most = std::max(most, *std::max_element(kept, kept + heads) + tokens_of(r, i));
  }
  return (most - 1) / page_size + 1;
}

// The rows' numbers, from the slots' tables.
void fill(const SlotTables& t, const DecodeRows& r, long heads, long pages, const DecoderStep& s, const Args& a) {
  int64_t* wanted = (int64_t*)s.logit_rows;
  for (long i = 0; i < r.count; i++) {
    const long slot = r.slots[i];
    const int32_t *kept = t.kept + slot * heads, *table = t.page_table + slot * heads * t.columns;
    const long first = first_row(r, i), angle = t.closes_up[slot] ? kept[0] : r.starts[i];
    for (long row = first; row < r.ends[i]; row++) {
      ((int64_t*)s.ids)[row] = r.ids[row] < 0 ? t.newest[slot] : r.ids[row];
      ((int64_t*)s.angle_rows)[row] = angle + row - first;
      ((int64_t*)a.positions)[row] = r.starts[i] + row - first;
    }
    for (long row = r.ends[i] - 1 - r.drafts[i]; row < r.ends[i]; row++) *wanted++ = row;
    ((int32_t*)a.query_start)[i] = first;
    memcpy((int32_t*)a.kept + i * heads, kept, heads * 4);
    for (long head = 0; head < heads; head++)
      memcpy((int32_t*)a.page_table + (i * heads + head) * pages, table + head * t.columns, pages * 4);
  }
  ((int32_t*)a.query_start)[r.count] = r.ends[r.count - 1];
}

// Sets the logits [V] to -inf whose bits are not set.
void forbid_unset(float* x, long vocab, const uint8_t* bits) {
  for (long first = 0; first < vocab; first += 32, bits += 4) {
    uint32_t word;
    memcpy(&word, bits, 4);
    if (word == 0xFFFFFFFFu) continue;
    const long count = std::min<long>(32, vocab - first);
    for (long i = 0; i < count; i++) x[first + i] = word >> i & 1 ? x[first + i] : -INFINITY;
  }
}

Cuts cuts_of(const SlotTables& t, long slot) {
  const float* strengths = t.strengths + slot * t.strength_columns;
  return {std::max(strengths[0], kLeastTemperature), strengths[1], logf(strengths[2]), (long)t.keys[2 * slot + 1]};
}

// The token drawn for a position from the slot's logits [V], which may be overwritten; -1 if they are not finite.
int64_t draw(const SlotTables& t, long slot, int64_t position, float* logits, long vocab, CutBuffers& buffers) {
  if (t.strengths[slot * t.strength_columns] == 0) {
    int64_t token;
    return std::isfinite(likeliest(logits, vocab, &token)) ? token : -1;
  }
  shape_row(logits, logits, vocab, cuts_of(t, slot), buffers);
  if (logits[0] != logits[0]) return -1;
  return draw_row(logits, vocab, NoiseKey(t.keys[2 * slot], position));
}

// Of a sequence that brings no drafts.
int64_t draw_next(const SlotTables& t, const DecodeRows& r, long i, float* logits, long vocab, CutBuffers& buffers) {
  if (r.masks && r.masked[i] >= 0) {
    if (!std::isfinite(largest(logits, vocab))) return -1;  // also where that is forbidden
    forbid_unset(logits, vocab, r.masks + r.masked[i] * r.mask_stride);
  }
  return draw(t, r.slots[i], r.starts[i] + tokens_of(r, i), logits, vocab, buffers);
}

// What the target says after the last known token and, as long as it says what is proposed, after each proposal:
// tokens [width]. `logits` are of these rows, one after another. Returns how many; 0 if one of the rows is not finite,
// which spoils what is computed beside it.
long verify(const SlotTables& t, const DecodeRows& r, long i, float* logits, long vocab, CutBuffers& buffers) {
  const long slot = r.slots[i], drafts = r.drafts[i], first = r.ends[i] - drafts;
  int32_t* tokens = r.tokens + i * r.width;
  long count = 0;
  bool open = true;  // nothing was rejected yet
  for (long k = 0; k <= drafts; k++, logits += vocab) {
    if (!open) {
      if (!std::isfinite(largest(logits, vocab))) return 0;
      continue;
    }
    const int64_t position = r.starts[i] + tokens_of(r, i) - drafts + k;
    const long place = k < drafts && r.places ? r.places[first + k] : -1;
    int64_t token;
    if (place >= 0) {
      shape_row(logits, logits, vocab, cuts_of(t, slot), buffers);
      if (logits[0] != logits[0]) return 0;
      const Noises noises{t.keys[2 * slot], position + kAcceptStream, position};
      open = judge_row(logits, r.scaled + place * vocab, vocab, r.ids[first + k], noises, &token);
    } else {
      token = draw(t, slot, position, logits, vocab, buffers);
      if (token < 0) return 0;
      open = k < drafts && token == r.ids[first + k];
    }
    tokens[count++] = token;
  }
  return count;
}

// Whether nobody alters the logits of any row.
bool unaltered(const SlotTables& t, const DecodeRows& r) {
  for (long i = 0; i < r.count; i++)
    if (!t.unaltered[r.slots[i]] || r.starts[i] + tokens_of(r, i) - r.drafts[i] < t.min_ends[r.slots[i]]) return false;
  return true;
}

void draw_all(const SlotTables& t, DecodeRows& r, long vocab) {
  r.drawn = unaltered(t, r);
  if (!r.drawn) return;
#pragma omp parallel num_threads(r.count < r.threads ? r.count : r.threads)
  {
    CutBuffers buffers;
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < r.count; i++) {
      int32_t* tokens = r.tokens + i * r.width;
      long count = 1;
      if (r.verify) {
        std::fill(tokens, tokens + r.width, -1);
        r.counts[i] = count = verify(t, r, i, r.logits + first_row(r, i) * vocab, vocab, buffers);
        if (!count) std::fill(tokens, tokens + r.width, -1);
      } else {
        tokens[0] = draw_next(t, r, i, r.logits + i * vocab, vocab, buffers);
      }
      t.newest[r.slots[i]] = count ? std::max(tokens[count - 1], 0) : 0;
    }
  }
}

// Entries of sequence i that stay: those of what is known, and of proposals that were right; if these are to be verified
// elsewhere, so are they counted there.
long staying(const DecodeRows& r, long i) {
  if (!r.drafts[i]) return tokens_of(r, i);
  return r.drawn && r.counts[i] ? tokens_of(r, i) - r.drafts[i] - 1 + r.counts[i] : 0;
}

}  // namespace
}  // namespace quire

// `attention` says what all steps share: pool, entry positions, sizes and scale. Returns 0; or, with nothing done, what
// is in the way: that many positions need angles, or a `Refusal`.
extern "C" long quire_decode_step(const quire::Decoder* decoder, const quire::Args* attention,
                                  const quire::SlotTables* tables, quire::DecodeRows* rows) {
  using namespace quire;
  const double started = now();
  const Decoder& d = *decoder;
  const SlotTables& t = *tables;
  DecodeRows& r = *rows;
  Args a = *attention;
  const long heads = d.count * a.kv_heads, pages = longest_head(t, r, heads, a.page_size);
  if (pages > t.columns) return kOutgrown;
  if (const long lacking = lacking_angles(t, r, heads)) return lacking;
  DecoderStep s{};
  a.query_stride = a.key_stride = a.value_stride = (a.heads + 2 * a.kv_heads) * a.width;
  static thread_local KeptMemory memory;
  lay_out(d, r, pages, (char*)memory.get(lay_out(d, r, pages, nullptr, s, a)), s, a);
  fill(t, r, heads, pages, s, a);
  const long item = d.is_bf16 ? 2 : 4;
  a.query = s.heads;
  a.key = (char*)s.heads + a.heads * a.width * item;
  a.value = (char*)a.key + a.kv_heads * a.width * item;
  a.sequences = r.count, s.wanted = wanted_rows(r), s.rows = r.ends[r.count - 1];
  if (s.rows == s.wanted) s.logit_rows = nullptr;
  a.table_head = pages, a.table_sequence = heads * pages, a.kept_sequence = heads;
  s.table_layer = a.kv_heads * pages, s.kept_layer = a.kv_heads;
  s.cos = r.cos, s.sin = r.sin, s.half = r.half, s.logits = r.logits, s.threads = r.threads;
  if (!quire_forward(decoder, &s, &a)) return kNoToken;
  const double computed = now();
  r.drawn = false;
  if (r.verify || s.wanted == r.count) draw_all(t, r, d.vocab);
  for (long i = 0; i < r.count; i++) {
    const long count = staying(r, i);
    for (long head = 0; head < heads; head++) t.kept[r.slots[i] * heads + head] += count;
    t.computed[r.slots[i]] += count;
  }
  r.forward_seconds = computed - started, r.sample_seconds = now() - computed;
  return 0;
}

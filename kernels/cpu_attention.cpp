// Ragged attention over the paged KV cache, and the append of new entries before it. The contract stands in
// attention.py and cache.py.
//
// Work is cut into tiles of up to kRows query heads that share one kv head: a decoding sequence's whole group is one
// tile, so that keys and values are read once for all of its query heads; a prompt chunk gives (tokens * group) / kRows
// tiles. A tile goes over its head's entries in parts of kPart, a part in blocks of kBlock with an online softmax. The
// parts of a single tile are computed by different threads and merged afterwards; several tiles are tasks of their own
// and merge as they go. Both ways fold the same parts in the same order, so a row's result does not depend on the batch,
// on how its prompt was cut into chunks, or on the number of threads.
//
// Roofline: a tile reads 2 * D * itemsize bytes of each entry of its kv head once, and computes 4 * D FLOPs per row of it.
// So decoding is bound by bytes at any usual group, and long chunks by FLOPs. benchmarks/cpu_kernels.py holds decoding
// against a plain read of as many bytes (README, Figures), and the whole against the reference, which is the oracle in
// tests/kernels/test_cpu_attention.py.
#include "cpu_attention_lanes.h"
#include "cpu_attention_vectors.h"
#include "cpu_kernels.h"

#include <stdlib.h>

#include <type_traits>

namespace quire {
namespace {

constexpr long kRunsPerThread = 16;
constexpr long kEnoughHeads = 4;  // per thread: so many heads keep all threads busy, each read in one go

struct Task {
  int32_t sequence, kv_head;
  int64_t item;         // first row of the tile
  int64_t begin, end;   // entries
  int64_t scratch;      // -1, or number of the state that this part of a lone tile is left in
  int32_t parts;        // of a lone tile: states to merge, set on its first task; else 0
};

inline State state_at(float* memory, long index, long rows, long padded) {
  float* base = memory + index * rows * (padded + 2 * kLanes);
  return State{base + rows * padded, base + rows * (padded + kLanes), base};
}

inline long count_tasks(const Args& a, bool few, Task* tasks, long* scratch, int* most_rows) {
  const long group = a.heads / a.kv_heads;
  long count = 0;
  *scratch = 0;
  *most_rows = 1;
  for (long s = 0; s < a.sequences; s++) {
    const long tokens = a.query_start[s + 1] - a.query_start[s], items = tokens * group;
    for (long k = 0; k < a.kv_heads; k++) {
      const long entries = a.kept[s * a.kept_sequence + k] + tokens;
      const bool lone = few && items <= kRows && entries > kPart;
      if (lone) {
        const long parts = (entries + kPart - 1) / kPart;
        *most_rows = items > *most_rows ? items : *most_rows;
        for (long part = 0; part < parts; part++, count++) {
          const long end = (part + 1) * kPart < entries ? (part + 1) * kPart : entries;
          if (tasks)
            tasks[count] = {(int32_t)s, (int32_t)k, 0, part * kPart, end, *scratch, part ? 0 : (int32_t)parts};
          ++*scratch;
        }
      } else {
        // The last tiles of a chunk see the most entries; started first, they do not leave one thread working alone.
        for (long item = (items - 1) / kRows * kRows; item >= 0; item -= kRows, count++)
          if (tasks) tasks[count] = {(int32_t)s, (int32_t)k, item, 0, entries, -1, 0};
      }
    }
  }
  return count;
}

inline Span span_of(const Args& a, const Task& task) {
  return {a.page_table + task.sequence * a.table_sequence + task.kv_head * a.table_head, task.begin, task.end};
}

template <class T, class Work>
inline void compute_task(const Args& a, const Task& task, Span following, const Tile<T>& tile, float* scratch,
                         int scratch_rows, long padded) {
  const Span all = span_of(a, task);
  const Work work(a, tile);
  if (task.scratch >= 0) {
    attend_part(a, tile, work, all, following, state_at(scratch, task.scratch, scratch_rows, padded));
    return;
  }
  static thread_local KeptMemory memory;
  float* own = (float*)memory.get(2 * kRows * (padded + 2 * kLanes) * sizeof(float));
  const State whole = state_at(own, 0, kRows, padded), part = state_at(own, 1, kRows, padded);
  for (long begin = 0; begin < all.end; begin += kPart) {
    const long end = begin + kPart < all.end ? begin + kPart : all.end;
    const Span rest = {all.pages, end, all.end};
    attend_part(a, tile, work, {all.pages, begin, end}, end < all.end ? rest : following, begin ? part : whole);
    if (begin) Work::merge(whole, part, tile.rows, padded);
  }
  write_tile<T, Work>(a, tile, whole, padded);
}

// use((Work*)nullptr) with the way in which tiles of `rows` rows are computed. On tile registers, either way gives a row
// the same bits.
template <class T, class Use>
inline void choose_work(const Args& a, int rows, Use use) {
#if defined(QUIRE_TILES)
  if constexpr (sizeof(T) == sizeof(bf16))
    if (TileWork::fits(a)) return LaneWork::pays(a, rows) ? use((LaneWork*)nullptr) : use((TileWork*)nullptr);
#endif
  use((VectorWork<T>*)nullptr);
}

template <class T>
inline void fill_task_tile(const Args& a, const Task& task, Tile<T>& tile) {
  const long tokens = a.query_start[task.sequence + 1] - a.query_start[task.sequence];
  fill_tile(a, task.sequence, task.kv_head, task.item, tokens * (a.heads / a.kv_heads), tile);
}

template <class T>
inline void run_task(const Args& a, const Task& task, Span following, float* scratch, int scratch_rows, long padded) {
  Tile<T> tile;
  fill_task_tile(a, task, tile);
  choose_work<T>(a, tile.rows, [&](auto* work) {
    using Work = std::remove_pointer_t<decltype(work)>;
    compute_task<T, Work>(a, task, following, tile, scratch, scratch_rows, padded);
  });
}

template <class T>
inline void finish_task(const Args& a, const Task& task, float* scratch, int scratch_rows, long padded) {
  Tile<T> tile;
  fill_task_tile(a, task, tile);
  const State whole = state_at(scratch, task.scratch, scratch_rows, padded);
  choose_work<T>(a, tile.rows, [&](auto* work) {
    using Work = std::remove_pointer_t<decltype(work)>;
    for (int part = 1; part < task.parts; part++)
      Work::merge(whole, state_at(scratch, task.scratch + part, scratch_rows, padded), tile.rows, padded);
    write_tile<T, Work>(a, tile, whole, padded);
  });
}

// Store the new keys, values and positions of sequence s at entries kept .. kept + tokens - 1 of every head.
template <class T>
inline void append_sequence(const Args& a, long s) {
  const long first = a.query_start[s], tokens = a.query_start[s + 1] - first;
  for (long k = 0; k < a.kv_heads; k++) {
    const int32_t* pages = a.page_table + s * a.table_sequence + k * a.table_head;
    const long held = a.kept[s * a.kept_sequence + k];
    for (long t = 0; t < tokens; t++) {
      const long page = pages[(held + t) / a.page_size], offset = (held + t) % a.page_size;
      T* key = (T*)a.pool + (page * 2 * a.page_size + offset) * a.width;
      memcpy(key, (const T*)a.key + (first + t) * a.key_stride + k * a.width, a.width * sizeof(T));
      memcpy(key + a.page_size * a.width, (const T*)a.value + (first + t) * a.value_stride + k * a.value_width,
             a.value_width * sizeof(T));
      a.entry_positions[page * a.page_size + offset] = a.positions[first + t];
    }
  }
}

template <class T>
void run(const Args& a, bool append, bool attend, int threads) {
  static thread_local KeptMemory task_memory, state_memory;
  const long padded = padded_width(a);
  long states = 0, count = 0;
  int rows = 1;
  Task* tasks = nullptr;
  float* scratch = nullptr;
  if (attend) {
    const bool few = a.sequences * a.kv_heads < kEnoughHeads * threads;
    count = count_tasks(a, few, nullptr, &states, &rows);
    tasks = (Task*)task_memory.get(count * sizeof(Task));
    count_tasks(a, few, tasks, &states, &rows);
    rows = (rows + 15) / 16 * 16;  // tile registers write whole groups of rows
    scratch = (float*)state_memory.get(states * rows * (padded + 2 * kLanes) * sizeof(float));
  }
#pragma omp parallel num_threads(threads)
  {
    if (append) {
#pragma omp for schedule(dynamic, 1)
      for (long s = 0; s < a.sequences; s++) append_sequence<T>(a, s);
    }
    if (attend) {
      // Several in a row for each thread, so that it knows what to ask memory for next; enough to share out the rest.
      const long run = count / (threads * kRunsPerThread) + 1;
#pragma omp for schedule(dynamic, 1) nowait
      for (long first = 0; first < count; first += run)
        for (long i = first; i < first + run && i < count; i++) {
          const Span following = i + 1 < first + run && i + 1 < count ? span_of(a, tasks[i + 1]) : Span{};
          run_task<T>(a, tasks[i], following, scratch, rows, padded);
        }
      if (states) {
#pragma omp barrier
#pragma omp for schedule(dynamic, 1) nowait
        for (long i = 0; i < count; i++)
          if (tasks[i].parts) finish_task<T>(a, tasks[i], scratch, rows, padded);
      }
    }
  }
}

}  // namespace
}  // namespace quire

// Pointers and strides (in elements) as in `Args`; do_append, do_attend: which of the two steps to take.
extern "C" void quire_attention(const quire::Args* args, int do_append, int do_attend, int is_bf16, int threads) {
  if (is_bf16)
    quire::run<quire::bf16>(*args, do_append, do_attend, threads);
  else
    quire::run<float>(*args, do_append, do_attend, threads);
}

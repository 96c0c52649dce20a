// Moving what pruned heads keep: runs of entries that stay side by side within a page are moved at once.
#include <stdint.h>
#include <string.h>

// Contract: kernels/compaction_reference.py. pool [P, 2, page, row] bytes, entry_positions [P, page]; source, target
// and keep have rows source_stride, target_stride and keep_stride numbers apart. A head's entries only move forward
// within its own pages, or into pages that nobody reads, so they are moved in ascending order without a copy.
extern "C" void quire_compact(char* pool, int32_t* entry_positions, const int32_t* source, const int32_t* target,
                              const int32_t* keep, const int32_t* counts, long source_stride, long target_stride,
                              long keep_stride, long heads, long page, long row, int threads) {
#pragma omp parallel for num_threads(heads < threads ? heads : threads) schedule(dynamic, 1)
  for (long head = 0; head < heads; head++) {
    const int32_t* kept = keep + head * keep_stride;
    long run;
    for (long j = 0; j < counts[head]; j += run) {
      const long i = kept[j], from_offset = i % page, to_offset = j % page;
      const long from = source[head * source_stride + i / page], to = target[head * target_stride + j / page];
      const long longest = page - (from_offset > to_offset ? from_offset : to_offset);
      for (run = 1; run < longest && j + run < counts[head] && kept[j + run] == i + run; run++) {
      }
      if (from == to && from_offset == to_offset) continue;
      for (long half = 0; half < 2; half++)
        memmove(pool + ((2 * to + half) * page + to_offset) * row, pool + ((2 * from + half) * page + from_offset) * row,
                run * row);
      memmove(entry_positions + to * page + to_offset, entry_positions + from * page + from_offset,
              run * sizeof(int32_t));
    }
  }
}

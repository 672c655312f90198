// Moves averages towards parameters in one pass over memory, with the bits of average_step_ (asgd/rule.py).
//
// kernels/cpu.py compiles this file once for each combination of dtypes, given by the macros of reals.h. It must be
// compiled with -ffp-contract=off.

#include "reals.h"

#ifdef _OPENMP
#include <omp.h>
#endif

typedef struct {
    const int64_t *params;           // memory address of each part
    const int64_t *starts, *numels;  // for each part: its first index in the averages, and its number of elements
    int64_t count;                   // number of parts
    Averages averages;
} Work;

// Moves all averages, from index `first` on, towards `numel` parameters.
static void move_part(const Averages *averages, int64_t first, const param_t *param, int64_t numel) {
#if PARAM == REAL
    if (averages->count == 1) return move_all(averages, first, param, numel);
#endif
    for (int64_t i = 0; i < numel; i += BLOCK) {
        int64_t size = numel - i < BLOCK ? numel - i : BLOCK;
#if PARAM == REAL
        move_all(averages, first + i, param + i, size);
#else
        real iterates[BLOCK];
        for (int64_t k = 0; k < size; k++) iterates[k] = PARAM_TO_REAL(param[i + k]);
        move_all(averages, first + i, iterates, size);
#endif
    }
}

// Moves all averages of elements [first, stop), counted through all parts one after the other.
static void move_range(const Work *w, int64_t first, int64_t stop) {
    for (int64_t k = 0, start = 0; k < w->count && start < stop; start += w->numels[k++]) {
        int64_t from = first > start ? first - start : 0;
        int64_t to = stop - start < w->numels[k] ? stop - start : w->numels[k];
        if (from < to)
            move_part(
                &w->averages, w->starts[k] + from, (const param_t *)(intptr_t)w->params[k] + from, to - from);
    }
}

// Moves the averages of all parts, by at most `threads` threads. The other arguments are those of Work and Averages.
void move(
    const int64_t *params, const int64_t *starts, const int64_t *numels, int64_t count, const int64_t *averages,
    const double *mus, int64_t averages_count, int64_t threads) {
    const Work work = {params, starts, numels, count, {averages, mus, averages_count}};
    int64_t total = 0;
    for (int64_t k = 0; k < count; k++) total += numels[k];
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            int64_t own = omp_get_thread_num(), all = omp_get_num_threads();
            move_range(&work, total / all * own, own + 1 == all ? total : total / all * (own + 1));
        }
        return;
    }
#endif
    move_range(&work, 0, total);
}

// Performs one step of the ASGD rule (asgd/rule.py) in one pass over memory, with the bits of PyTorch's operators.
//
// kernels/cpu.py compiles this file once for each combination of dtypes, given by the macros of reals.h and by:
// GRAD, ROUNDED  F32, F64, BF16 or F16: the dtype of gradients, and the one to which parameters are rounded, which is
//                PARAM or narrower.
// MASTER         1 if there are masters.
// STOCHASTIC     1 if rounding is stochastic.
// Masters are in REAL, which is F64 if PARAM is F64 and otherwise F32.
//
// It must be compiled with -ffp-contract=off: only the two products written as FMA are fused with a sum, because
// torch.add(alpha=) fuses these and no others.

#include <math.h>

#include "reals.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#if REAL == F64
#define FMA fma
#else
#define FMA fmaf
#endif

static inline bfloat to_bfloat(float value) {  // rounds to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = value != value ? 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
    return (bfloat){(uint16_t)(bits >> 16)};
}

static inline uint32_t scramble(uint32_t number) {  // finalizer of MurmurHash3 (Appleby, 2011, public domain)
    number = (number ^ number >> 16) * 0x85ebca6b;
    number = (number ^ number >> 13) * 0xc2b2ae35;
    return number ^ number >> 16;
}

// Rounds to the value above or below, with the bits of round_stochastically in asgd/rounding.py.
static inline bfloat to_bfloat_stochastically(float value, uint32_t seed, uint32_t number) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t noise = scramble((number * 0x9e3779b1) ^ seed) & 0xffff;
    bits = value - value == 0 ? bits + noise : value != value ? 0x7fc00000 : bits;  // infinities stay
    return (bfloat){(uint16_t)(bits >> 16)};
}

#if PARAM == BF16
#define ROUND to_bfloat
#elif ROUNDED == BF16
#define ROUND(value) from_bfloat(to_bfloat(value))
#elif ROUNDED == F16
#define ROUND(value) (param_t)(_Float16)(value)
#elif ROUNDED == F32
#define ROUND(value) (param_t)(float)(value)
#else
#define ROUND (param_t)
#endif

#if GRAD == BF16
typedef bfloat grad_t;
#define GRAD_TO_REAL from_bfloat
#else
#if GRAD == F16
typedef _Float16 grad_t;
#elif GRAD == F64
typedef double grad_t;
#else
typedef float grad_t;
#endif
#define GRAD_TO_REAL (real)
#endif

typedef struct {
    double shrink, eta, weight_decay;
    int64_t maximize, seed, first;
} Step;  // kernels/cpu.py packs it

// What a step does to the average. It is a constant in each call of step(), so that the loop has no branches; so is
// whether there is weight decay.
enum { NO_AVERAGE, BECOMES, MOVES };

static inline __attribute__((always_inline)) void step(
    param_t *restrict param, const grad_t *restrict grad, real *restrict average, real *restrict master, int64_t numel,
    uint32_t first, const Step *s, const real mu, const int averaging, const int decays) {
    const real shrink = (real)s->shrink, eta = (real)-s->eta, decay = (real)s->weight_decay;
    const real sign = s->maximize ? -1 : 1;
    for (int64_t i = 0; i < numel; i++) {
        real p = PARAM_TO_REAL(param[i]);
#if MASTER
        // A master whose rounding is not the parameter is out of date: somebody has written the parameter.
        p = PARAM_TO_REAL(ROUND(master[i])) == p ? master[i] : p;
#endif
        real g = sign * GRAD_TO_REAL(grad[i]);
        if (decays) g = FMA(p, decay, g);
        p = p * shrink;
        p = FMA(g, eta, p);
        if (averaging == BECOMES) average[i] = p;
        if (averaging == MOVES) average[i] = moved(average[i], p, mu);
#if MASTER
        master[i] = p;
#endif
#if STOCHASTIC
        param[i] = to_bfloat_stochastically(p, (uint32_t)s->seed, first + (uint32_t)i);
#else
        param[i] = ROUND(p);
#endif
    }
}

// Updates `numel` elements and at most one average, which becomes the parameter if mu is 1.
static void update_block(
    param_t *param, const grad_t *grad, real *average, double mu, real *master, int64_t numel, uint32_t first,
    const Step *s) {
#define CASE(averages, decays) step(param, grad, average, master, numel, first, s, (real)mu, averages, decays)
    if (s->weight_decay != 0) {
        if (!average) CASE(NO_AVERAGE, 1);
        else if (mu == 1) CASE(BECOMES, 1);
        else CASE(MOVES, 1);
    } else {
        if (!average) CASE(NO_AVERAGE, 0);
        else if (mu == 1) CASE(BECOMES, 0);
        else CASE(MOVES, 0);
    }
}

typedef struct {
    const int64_t *params, *grads;   // memory addresses of each part and its gradient
    const int64_t *starts, *numels;  // for each part: its first index in averages and master, and its number of elements
    int64_t count;                   // number of parts
    Averages averages;
    real *master;                    // null if there is none
    const Step *step;
} Work;

// Updates elements [from, to) of part `k`. Several averages move towards a copy of a block of iterates, before rounding.
static void update_part(const Work *w, int64_t k, int64_t from, int64_t to) {
    const int several = w->averages.count > 1;
    real iterates[BLOCK];
    for (int64_t i = from, size = to - from; i < to; i += size) {
        if (several) size = to - i < BLOCK ? to - i : BLOCK;
        int64_t where = w->starts[k] + i;
        real *one = w->averages.count == 1 ? (real *)(intptr_t)w->averages.addresses[0] + where : 0;
        update_block(
            (param_t *)(intptr_t)w->params[k] + i, (const grad_t *)(intptr_t)w->grads[k] + i,
            several ? iterates : one, one ? w->averages.mus[0] : 1, w->master ? w->master + where : 0, size,
            (uint32_t)(w->step->first + where), w->step);
        if (several) move_all(&w->averages, where, iterates, size);
    }
}

// Updates elements [first, stop), counted through all parts one after the other.
static void update_range(const Work *w, int64_t first, int64_t stop) {
    for (int64_t k = 0, start = 0; k < w->count && start < stop; start += w->numels[k++]) {
        int64_t from = first > start ? first - start : 0;
        int64_t to = stop - start < w->numels[k] ? stop - start : w->numels[k];
        if (from < to) update_part(w, k, from, to);
    }
}

// Updates all parts of one step, by at most `threads` threads. The other arguments are those of Work and Averages.
void update(
    const int64_t *params, const int64_t *grads, const int64_t *starts, const int64_t *numels, int64_t count,
    const int64_t *averages, const double *mus, int64_t averages_count, real *master, const Step *s, int64_t threads) {
    const Work work = {params, grads, starts, numels, count, {averages, mus, averages_count}, master, s};
    int64_t total = 0;
    for (int64_t k = 0; k < count; k++) total += numels[k];
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            int64_t own = omp_get_thread_num(), all = omp_get_num_threads();
            update_range(&work, total / all * own, own + 1 == all ? total : total / all * (own + 1));
        }
        return;
    }
#endif
    update_range(&work, 0, total);
}

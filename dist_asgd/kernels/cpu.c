// Performs one step of the ASGD rule (asgd/rule.py) in one pass over memory, with the bits of PyTorch's operators.
//
// kernels/cpu.py compiles this file once for each combination of dtypes, given by macros:
// PARAM, GRAD, ROUNDED  F32, F64, BF16 or F16: dtypes of parameters and gradients, and the one to which parameters are
//                       rounded, which is PARAM or narrower.
// MASTER                1 if there are masters.
// STOCHASTIC            1 if rounding is stochastic.
// The arithmetic, averages and masters are double if PARAM is F64, otherwise float.
//
// It must be compiled with -ffp-contract=off: only the two products written as FMA are fused with a sum, because
// torch.add(alpha=) fuses these and no others.

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#define F32 1
#define F64 2
#define BF16 3
#define F16 4

#if PARAM == F64
typedef double real;
#define FMA fma
#else
typedef float real;
#define FMA fmaf
#endif

typedef struct { uint16_t bits; } bfloat;

static inline float from_bfloat(bfloat value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float result;
    memcpy(&result, &bits, sizeof bits);
    return result;
}

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
typedef bfloat param_t;
#define PARAM_TO_REAL from_bfloat
#define ROUND to_bfloat
#else
#if PARAM == F16
typedef _Float16 param_t;
#else
typedef real param_t;
#endif
#define PARAM_TO_REAL (real)
#if ROUNDED == BF16
#define ROUND(value) from_bfloat(to_bfloat(value))
#elif ROUNDED == F16
#define ROUND(value) (param_t)(_Float16)(value)
#elif ROUNDED == F32
#define ROUND(value) (param_t)(float)(value)
#else
#define ROUND (param_t)
#endif
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
    double shrink, eta, mu, weight_decay;
    int64_t maximize, averages, seed, first;
} Step;  // kernels/cpu.py packs it

// What a step does to the average. It is a constant in each call of step(), so that the loop has no branches; so is
// whether there is weight decay.
enum { NO_AVERAGE, BECOMES, MOVES };

static inline __attribute__((always_inline)) void step(
    param_t *restrict param, const grad_t *restrict grad, real *restrict average, real *restrict master, int64_t numel,
    uint32_t first, const Step *s, const int averaging, const int decays) {
    const real shrink = (real)s->shrink, eta = (real)-s->eta, mu = (real)s->mu, decay = (real)s->weight_decay;
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
        if (averaging == MOVES) average[i] = average[i] + (p - average[i]) * mu;
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

static void update_part(
    param_t *param, const grad_t *grad, real *average, real *master, int64_t numel, uint32_t first, const Step *s) {
    const int averaging = !s->averages ? NO_AVERAGE : (real)s->mu == 1 ? BECOMES : MOVES;
#define CASE(averages, decays) step(param, grad, average, master, numel, first, s, averages, decays)
    if (s->weight_decay != 0) {
        if (averaging == NO_AVERAGE) CASE(NO_AVERAGE, 1);
        else if (averaging == BECOMES) CASE(BECOMES, 1);
        else CASE(MOVES, 1);
    } else {
        if (averaging == NO_AVERAGE) CASE(NO_AVERAGE, 0);
        else if (averaging == BECOMES) CASE(BECOMES, 0);
        else CASE(MOVES, 0);
    }
}

typedef struct {
    const int64_t *params, *grads;   // memory addresses of each part and its gradient
    const int64_t *starts, *numels;  // for each part: its first index in average and master, and its number of elements
    int64_t count;                   // number of parts
    real *average, *master;          // null if there is none
    const Step *step;
} Work;

// Updates elements [first, stop), counted through all parts one after the other.
static void update_range(const Work *w, int64_t first, int64_t stop) {
    for (int64_t k = 0, start = 0; k < w->count && start < stop; start += w->numels[k++]) {
        int64_t from = first > start ? first - start : 0;
        int64_t to = stop - start < w->numels[k] ? stop - start : w->numels[k];
        if (from >= to) continue;
        int64_t where = w->starts[k] + from;
        update_part(
            (param_t *)(intptr_t)w->params[k] + from, (const grad_t *)(intptr_t)w->grads[k] + from,
            w->average ? w->average + where : 0, w->master ? w->master + where : 0, to - from,
            (uint32_t)(w->step->first + where), w->step);
    }
}

// Updates all parts of one step, by at most `threads` threads. The arguments are those of Work.
void update(
    const int64_t *params, const int64_t *grads, const int64_t *starts, const int64_t *numels, int64_t count,
    real *average, real *master, const Step *s, int64_t threads) {
    const Work work = {params, grads, starts, numels, count, average, master, s};
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

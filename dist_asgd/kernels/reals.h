// Types and conversions of the C files in this folder, which are compiled once for each combination of dtypes.
//
// Macros of the compiler's command line give the dtypes, as F32, F64, BF16 or F16:
// PARAM  the dtype of parameters.
// REAL   F32 or F64: the dtype of averages and of all arithmetic.

#include <stdint.h>
#include <string.h>

#define F32 1
#define F64 2
#define BF16 3
#define F16 4

#if REAL == F64
typedef double real;
#else
typedef float real;
#endif

typedef struct { uint16_t bits; } bfloat;

static inline float from_bfloat(bfloat value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float result;
    memcpy(&result, &bits, sizeof bits);
    return result;
}

#if PARAM == BF16
typedef bfloat param_t;
#define PARAM_TO_REAL from_bfloat
#else
#if PARAM == F16
typedef _Float16 param_t;
#elif PARAM == F64
typedef double param_t;
#else
typedef float param_t;
#endif
#define PARAM_TO_REAL (real)
#endif

// Elements that all averages take, one average after the other, before the next elements. These stay in the first cache
// meanwhile, so that each parameter is read once from memory. Blocks of 32 to 256 elements take the same time as one loop
// over all averages; with 1,024 the processor's prefetching fails, and two averages take a third longer.
#define BLOCK 128

// Returns an average after it has moved towards an iterate: three rounded operations, as average_step_ in asgd/rule.py.
static inline real moved(real average, real iterate, real mu) {
    return average + (iterate - average) * mu;
}

typedef struct {
    const int64_t *addresses;  // the memory address of each average
    const double *mus;         // the mu of each average
    int64_t count;
} Averages;

// Moves all averages, from index `first` on, towards `numel` iterates.
static inline void move_all(const Averages *averages, int64_t first, const real *restrict iterates, int64_t numel) {
    for (int64_t a = 0; a < averages->count; a++) {
        real *restrict average = (real *)(intptr_t)averages->addresses[a] + first;
        const real mu = (real)averages->mus[a];
        if (averages->mus[a] == 1)
            for (int64_t i = 0; i < numel; i++) average[i] = iterates[i];
        else
            for (int64_t i = 0; i < numel; i++) average[i] = moved(average[i], iterates[i], mu);
    }
}

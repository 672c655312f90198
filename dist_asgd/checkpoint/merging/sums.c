// Weighted sums in float64, each in one pass over memory, with the bits of the operators in sums.py.
//
// It is compiled for one dtype of values, which the macro VALUE gives as F64, F32, BF16 or F16, and with
// -ffp-contract=off: only fma() adds and multiplies at once.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define F64 1
#define F32 2
#define BF16 3
#define F16 4

#if VALUE == F64
typedef double value;
#elif VALUE == F32
typedef float value;
#elif VALUE == F16
typedef _Float16 value;
#else
typedef uint16_t value;  // the upper half of a float's bits
#endif

static inline float float_of(uint32_t bits) {
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline uint32_t bits_of(float number) {
    uint32_t result;
    memcpy(&result, &number, sizeof result);
    return result;
}

static inline double wide(value number) {
#if VALUE == BF16
    return float_of((uint32_t)number << 16);
#elif VALUE == F16  // by integers, of which compilers make vectors
    uint16_t half;
    memcpy(&half, &number, sizeof half);
    const uint32_t bits = bits_of(float_of((uint32_t)(half & 0x7FFF) << 13) * 0x1p112f);  // another bias of exponents
    const uint32_t infinite = (half & 0x7C00) == 0x7C00 ? 0x7F800000 : 0, sign = (uint32_t)(half & 0x8000) << 16;
    return float_of(bits | infinite | sign);
#else
    return (double)number;
#endif
}

#define SLICE 1024  // elements of a sum that stay in cache while those of one source after the other are added

// Adds elements of several sources, whose memory addresses and weights are given, to sums.
void add(
    double *restrict sum, int64_t count, const int64_t *addresses, const double *weights, int64_t sources,
    int64_t is_first) {
    for (int64_t start = 0; start < count; start += SLICE) {
        const int64_t stop = count - start < SLICE ? count : start + SLICE;
        if (is_first)
            for (int64_t i = start; i < stop; i++) sum[i] = -0.0;
        for (int64_t s = 0; s < sources; s++) {
            const value *restrict values = (const value *)(intptr_t)addresses[s];
            const double weight = weights[s];
            for (int64_t i = start; i < stop; i++) sum[i] = fma(wide(values[i]), weight, sum[i]);
        }
    }
}

#if VALUE == BF16 || VALUE == F16
#define BLOCK 256  // elements of finish() that are in the first cache at once; compilers make vectors of its short loops

static inline value narrow(uint32_t bits) {
#if VALUE == F16
    return (_Float16)float_of(bits);
#else
    const uint32_t up = 0x7FFF + ((bits >> 16) & 1);  // ties to even
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (value)((bits + up) >> 16);
#endif
}

// Rounds each sum / total once. A float gets, of its two numbers around a quotient, the one with an odd last bit: that is
// never in the middle between two numbers of 16 bits.
void finish(value *restrict mean, const double *restrict sum, int64_t count, double total) {
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t size = count - start < BLOCK ? count - start : BLOCK;
        float near[BLOCK], beyond[BLOCK];  // beyond: 1 where the quotient is larger in magnitude than near, -1 if smaller
        uint32_t bits[BLOCK];
        for (int64_t i = 0; i < size; i++) {
            const double quotient = sum[start + i] / total;
            near[i] = (float)quotient;
            const double wide_near = (double)near[i], more = fabs(quotient), than = fabs(wide_near);
            beyond[i] = (float)((more > than ? 1.0 : 0.0) - (more < than ? 1.0 : 0.0));
        }
        memcpy(bits, near, (size_t)size * sizeof *bits);
        for (int64_t i = 0; i < size; i++) {
            const uint32_t step = (uint32_t)(int32_t)beyond[i];
            mean[start + i] = narrow(bits[i] + (bits[i] & 1 ? 0 : step));
        }
    }
}
#else
void finish(value *restrict mean, const double *restrict sum, int64_t count, double total) {
    for (int64_t i = 0; i < count; i++) mean[i] = (value)(sum[i] / total);
}
#endif

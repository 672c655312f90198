// How tensors lie in memory, asked of PyTorch for many of them by one call, through DLPack's C exchange API
// (https://dmlc.github.io/dlpack). look.py says what for.

#include <stdint.h>
#include <string.h>

typedef struct { int32_t type, id; } Device;
typedef struct { uint8_t code, bits; uint16_t lanes; } DType;

typedef struct {
    void *data;
    Device device;
    int32_t ndim;
    DType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;  // as in dlpack.h, version 1

typedef struct {
    int (*view)(void *object, DLTensor *view);      // dltensor_from_py_object_no_sync; 0, or an exception was set
    void *(*get)(void *object, void *name);         // PyObject_GetAttr: a new reference, or an exception was set
    int (*append)(void *list, void *object);        // PyList_Append: 0, or an exception was set
    void (*release)(void *object);                  // Py_DecRef
} Python;  // as look.py packs it

typedef struct {
    void *const *objects;
    const int64_t *hints;      // where PyTorch has the rest of each: only prefetched
    const int64_t *addresses;  // of their elements
    const int64_t *dims;       // of each: how many; then size and stride of each
    void *like;                // a tensor of their dtype and on their device
    int64_t count;
} Params;  // as look.py packs it

#define AHEAD 8         // objects
#define HINTED_LINES 4  // of a cache, of 64 bytes

// Whether there are so many dims, of these sizes and strides. Of one element or none, or one along a dim, strides say
// nothing.
static int fits(const DLTensor *view, const int64_t *dims) {
    int dense = 1, empty = 0;
    if (view->ndim != *dims++) return 0;
    for (int32_t d = 0; d < view->ndim; d++) {
        if (view->shape[d] != dims[2 * d]) return 0;
        empty |= view->shape[d] == 0;
        dense &= view->shape[d] == 1 || view->strides[d] == dims[2 * d + 1];
    }
    return empty || (dense && view->data);
}

static int alike(const DLTensor *one, const DLTensor *other) {
    return !memcmp(&one->device, &other->device, sizeof one->device) && !memcmp(&one->dtype, &other->dtype, sizeof one->dtype);
}

static int64_t address_of(const DLTensor *view) {
    return (int64_t)((intptr_t)view->data + view->byte_offset);
}

// Of the next ones, what will be read first: after a backward, none of it is in the caches.
static inline void fetch_ahead(const Params *p, int64_t k) {
    if (k >= p->count) return;
    __builtin_prefetch(p->objects[k]);
    for (int line = 0; line < HINTED_LINES; line++) __builtin_prefetch((const char *)p->hints[k] + 64 * line);
}

// Appends the gradients of `params`, and writes their addresses. Returns 1; 0 at the first parameter or gradient that
// does not lie as expected; -1 if an exception was set.
int64_t look(const Python *python, const Params *params, void *grad, void *found, int64_t *addresses) {
    DLTensor like, param, own;
    if (python->view(params->like, &like)) return -1;
    const int64_t *dims = params->dims;
    for (int64_t k = 0; k < params->count; k++) {
        fetch_ahead(params, k + AHEAD);
        void *object = python->get(params->objects[k], grad);
        if (!object) return -1;
        int failed = python->append(found, object);
        python->release(object);  // the list has it
        if (failed || python->view(params->objects[k], &param) || python->view(object, &own)) return -1;
        if (address_of(&param) != params->addresses[k] || !alike(&param, &like) || !alike(&own, &like)) return 0;
        if (!fits(&param, dims) || !fits(&own, dims)) return 0;
        dims += 1 + 2 * own.ndim;
        addresses[k] = address_of(&own);
    }
    return 1;
}

// The same of tensors themselves, and nothing else.
int64_t look_at(const Python *python, const Params *params, void *const *objects, int64_t *addresses) {
    DLTensor like, own;
    if (python->view(params->like, &like)) return -1;
    const int64_t *dims = params->dims;
    for (int64_t k = 0; k < params->count; k++) {
        if (python->view(objects[k], &own)) return -1;
        if (!alike(&own, &like) || !fits(&own, dims)) return 0;
        dims += 1 + 2 * own.ndim;
        addresses[k] = address_of(&own);
    }
    return 1;
}

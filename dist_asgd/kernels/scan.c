// Reads the memory layout of many tensors by one call, through DLPack's C exchange API (https://dmlc.github.io/dlpack).
// kernels/scan.py compiles and calls this; its head says what for.

#include <stdint.h>
#include <string.h>

#define AHEAD 16  // number of parameters between a prefetch and its use; 8 to 32 take the same time

typedef struct { int32_t type, id; } Device;
typedef struct { uint8_t code, bits; uint16_t lanes; } DType;

typedef struct {
    void *data;
    Device device;
    int32_t ndim;
    DType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;  // layout as in dlpack.h, version 1

typedef struct {
    int (*view)(void *object, DLTensor *view);      // dltensor_from_py_object_no_sync; 0, or an exception was set
    void *(*get)(void *object, void *name);         // PyObject_GetAttr: a new reference, or an exception was set
    int (*append)(void *list, void *object);        // PyList_Append: 0, or an exception was set
    void (*release)(void *object);                  // Py_DecRef
} Python;  // kernels/scan.py packs it

typedef struct {
    const int64_t *dims;  // for each tensor: the number of dims, then the size and the stride (in elements) of each dim
    void *like;           // a Python tensor of the expected dtype and device
    int64_t count;        // number of tensors
} Expected;  // kernels/scan.py packs it

// Returns whether `view` has the expected dims. A dim of size 1 may have any stride, and so may every dim of a tensor
// without elements.
static int has_dims(const DLTensor *view, const int64_t *dims) {
    int dense = 1, empty = 0;
    if (view->ndim != *dims++) return 0;
    for (int32_t d = 0; d < view->ndim; d++) {
        if (view->shape[d] != dims[2 * d]) return 0;
        empty |= view->shape[d] == 0;
        dense &= view->shape[d] == 1 || view->strides[d] == dims[2 * d + 1];
    }
    return empty || (dense && view->data);
}

static int64_t address_of(const DLTensor *view) {
    return (int64_t)((intptr_t)view->data + view->byte_offset);
}

// Returns whether `view` has the device and dtype of `like`, and the expected dims.
static int fits(const DLTensor *view, const DLTensor *like, const int64_t *dims) {
    return !memcmp(&view->device, &like->device, sizeof view->device) &&
        !memcmp(&view->dtype, &like->dtype, sizeof view->dtype) && has_dims(view, dims);
}

// Writes the address of each of the Python objects `tensors` into `addresses`. Returns 1 if all are as expected, 0 if
// any is not, and -1 if a Python exception was set.
int64_t scan(const Python *python, const Expected *expected, void *const *tensors, int64_t *addresses) {
    DLTensor like, view;
    if (python->view(expected->like, &like)) return -1;
    const int64_t *dims = expected->dims;
    for (int64_t k = 0; k < expected->count; k++, dims += 1 + 2 * *dims) {
        if (python->view(tensors[k], &view)) return -1;
        if (!fits(&view, &like, dims)) return 0;
        addresses[k] = address_of(&view);
    }
    return 1;
}

typedef struct {
    const int64_t *param, *grad;  // the shapes of both, which PyTorch keeps inside the C++ tensor objects
    const void *object;           // the Python object of the gradient
} Seen;  // addresses from the last scan, used only to prefetch

// Prefetches the cache lines around a shape. A prefetch ahead of its use takes a third off a scan that follows a
// backward. It reads nothing, so the memory may have been freed.
static void prefetch(const int64_t *shape) {
    for (int line = -1; line <= 2; line++) __builtin_prefetch((const void *)((intptr_t)shape + 64 * line));
}

// Writes the address of the gradient of each of `params` into `addresses`, and appends the gradients to the Python list
// `found`. Parameters must be as expected too, and lie at `places`. `grad` is the Python string "grad". Returns what
// scan() returns.
// One pass reads parameters and gradients, since after a backward neither is in the caches.
int64_t scan_gradients(
    const Python *python, const Expected *expected, void *const *params, const int64_t *places, Seen *seen, void *grad,
    void *found, int64_t *addresses) {
    DLTensor like, param, view;
    if (python->view(expected->like, &like)) return -1;
    const int64_t *dims = expected->dims;
    for (int64_t k = 0; k < expected->count; k++, dims += 1 + 2 * *dims) {
        if (k + AHEAD < expected->count) {
            const Seen *next = &seen[k + AHEAD];
            __builtin_prefetch(params[k + AHEAD]);
            __builtin_prefetch(next->object);
            prefetch(next->param);
            prefetch(next->grad);
        }
        void *object = python->get(params[k], grad);
        if (!object) return -1;
        int failed = python->append(found, object);
        python->release(object);  // the list holds a reference
        if (failed || python->view(params[k], &param) || python->view(object, &view)) return -1;
        seen[k] = (Seen){param.shape, view.shape, object};
        if (address_of(&param) != places[k] || !fits(&param, &like, dims) || !fits(&view, &like, dims)) return 0;
        addresses[k] = address_of(&view);
    }
    return 1;
}

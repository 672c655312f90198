// How tensors lie in memory, asked of PyTorch for many of them by one call, through DLPack's C exchange API
// (https://dmlc.github.io/dlpack). kernels/scan.py says what for.

#include <stdint.h>
#include <string.h>

#define AHEAD 16  // so many parameters; 8 to 32 take the same time

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
} Python;  // as kernels/scan.py packs it

typedef struct {
    const int64_t *dims;  // of each tensor: how many; then size and stride of each
    void *like;           // a tensor of their dtype and on their device
    int64_t count;
} Expected;  // as kernels/scan.py packs it

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

static int64_t address_of(const DLTensor *view) {
    return (int64_t)((intptr_t)view->data + view->byte_offset);
}

// Whether it lies as expected.
static int is(const DLTensor *view, const DLTensor *like, const int64_t *dims) {
    return !memcmp(&view->device, &like->device, sizeof view->device) &&
        !memcmp(&view->dtype, &like->dtype, sizeof view->dtype) && fits(view, dims);
}

// Writes the addresses of tensors. Returns 1; 0 at the first that does not lie as expected; -1 if an exception was set.
int64_t look(const Python *python, const Expected *expected, void *const *tensors, int64_t *addresses) {
    DLTensor like, view;
    if (python->view(expected->like, &like)) return -1;
    const int64_t *dims = expected->dims;
    for (int64_t k = 0; k < expected->count; k++, dims += 1 + 2 * *dims) {
        if (python->view(tensors[k], &view)) return -1;
        if (!is(&view, &like, dims)) return 0;
        addresses[k] = address_of(&view);
    }
    return 1;
}

typedef struct {
    const int64_t *param, *grad;  // their shapes, which PyTorch keeps within the tensors
    const void *object;           // the gradient, to Python
} Seen;  // by the last look

// Asks the caches for what lies around a shape: ahead, so that memory is not waited for anew with each tensor, which
// takes a third off the look after a backward. Nothing is read, so it may be gone.
static void fetch(const int64_t *shape) {
    for (int line = -1; line <= 2; line++) __builtin_prefetch((const void *)((intptr_t)shape + 64 * line));
}

// The same of the gradients of `params`, which it appends to the list `found`. The parameters, too, have to lie as
// expected, and at `places`. Both by one walk, since after a backward none of this is in the caches.
int64_t look_at_gradients(
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
            fetch(next->param);
            fetch(next->grad);
        }
        void *object = python->get(params[k], grad);
        if (!object) return -1;
        int failed = python->append(found, object);
        python->release(object);  // the list has it
        if (failed || python->view(params[k], &param) || python->view(object, &view)) return -1;
        seen[k] = (Seen){param.shape, view.shape, object};
        if (address_of(&param) != places[k] || !is(&param, &like, dims) || !is(&view, &like, dims)) return 0;
        addresses[k] = address_of(&view);
    }
    return 1;
}

/* The walk along a prompt's blocks, compiled: how far each holder has them. See kv/walk.py, which does the same;
 * tests/contract/test_native_walk.py runs the same cases against both.
 */
#include "native.h"

enum { STRIDE = 32 };

static int put(PyObject *found, Py_ssize_t place, PyObject *depth)
{
    return PyList_SetItem(found, place, Py_NewRef(depth)); /* IndexError beyond the end */
}

/* found[place] = depth for the bits of `mask`; -1: it raised. */
static int settle(PyObject *found, PyObject *mask, Py_ssize_t depth, PyObject *places_of)
{
    PyObject *number = PyLong_FromSsize_t(depth);
    if (number == NULL)
        return -1;
    int result = 0;
    unsigned long long bits = PyLong_AsUnsignedLongLong(mask);
    if (bits != (unsigned long long)-1 || !PyErr_Occurred()) {
        for (; bits && result == 0; bits &= bits - 1)
            result = put(found, __builtin_ctzll(bits), number);
    } else if (!PyErr_ExceptionMatches(PyExc_OverflowError)) {
        result = -1;
    } else { /* more than 64 places */
        PyErr_Clear();
        PyObject *places = PyObject_CallFunctionObjArgs(places_of, mask, NULL);
        Py_ssize_t count = places == NULL ? -1 : PyTuple_Size(places);
        result = count < 0 ? -1 : 0;
        for (Py_ssize_t i = 0; i < count && result == 0; i++) {
            Py_ssize_t place = PyLong_AsSsize_t(PyTuple_GetItem(places, i));
            result = place == -1 && PyErr_Occurred() ? -1 : put(found, place, number);
        }
        Py_XDECREF(places);
    }
    Py_DECREF(number);
    return result;
}

/* The mask of a block, borrowed; `zero` where there is none; NULL: it raised. */
static PyObject *mask_at(PyObject *masks, PyObject *hashes, Py_ssize_t at, PyObject *zero)
{
    PyObject *hash = PyList_GetItem(hashes, at);
    PyObject *mask = hash == NULL ? NULL : PyDict_GetItemWithError(masks, hash);
    return mask != NULL || PyErr_Occurred() ? mask : zero;
}

/* Take those of `alive` (owned, replaced) that do not hold block `at`, by `mask`, out; 1: some went, -1: raised. */
static int part(PyObject **alive, PyObject *mask, Py_ssize_t at, PyObject *found, PyObject *places_of)
{
    PyObject *still = PyNumber_And(*alive, mask);
    int same = still == NULL ? -1 : PyObject_RichCompareBool(still, *alive, Py_EQ);
    if (same != 0) {
        Py_XDECREF(still);
        return same < 0 ? -1 : 0;
    }
    PyObject *gone = PyNumber_Xor(*alive, still);
    int result = gone == NULL ? -1 : settle(found, gone, at, places_of);
    Py_XDECREF(gone);
    Py_DECREF(*alive);
    *alive = still;
    return result < 0 ? -1 : 1;
}

/* Whether all blocks up to `last` are held by all of `alive`, where holders can only get fewer; -1: it raised. */
static int all_hold(PyObject *masks, PyObject *hashes, Py_ssize_t last, PyObject *alive, PyObject *zero)
{
    PyObject *mask = mask_at(masks, hashes, last, zero);
    return mask == NULL ? -1 : PyObject_RichCompareBool(mask, alive, Py_EQ);
}

/* walk(masks, hashes, alive, found, shrinking, places_of) -> where the last of `alive` ended, or how many there are */
static PyObject *walk(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *masks, *hashes, *alive, *found, *places_of;
    int shrinking;
    if (!PyArg_ParseTuple(args, "O!O!O!O!pO", &PyDict_Type, &masks, &PyList_Type, &hashes, &PyLong_Type, &alive,
                          &PyList_Type, &found, &shrinking, &places_of))
        return NULL;
    PyObject *zero = PyLong_FromLong(0);
    if (zero == NULL)
        return NULL;
    Py_INCREF(alive);
    Py_ssize_t total = PyList_Size(hashes), at = 0;
    PyObject *last = NULL; /* compared by identity only: what it was may be gone */
    int living = PyObject_IsTrue(alive);
    while (living > 0 && at < total) {
        Py_ssize_t until = total - at > STRIDE ? at + STRIDE : total;
        int skip = shrinking ? all_hold(masks, hashes, until - 1, alive, zero) : 0;
        for (; skip == 0 && living > 0 && at < until; at++) {
            PyObject *mask = mask_at(masks, hashes, at, zero);
            if (mask == last)
                continue;
            last = mask;
            int parted = mask == NULL ? -1 : part(&alive, mask, at, found, places_of);
            if (parted > 0)
                living = PyObject_IsTrue(alive);
            else if (parted < 0)
                living = -1;
            if (living <= 0)
                break;
        }
        if (skip > 0)
            at = until;
        else if (skip < 0)
            living = -1;
    }
    if (living > 0 && settle(found, alive, total, places_of) < 0)
        living = -1;
    Py_DECREF(alive);
    Py_DECREF(zero);
    return living < 0 ? NULL : PyLong_FromSsize_t(living ? total : at);
}

static PyMethodDef functions[] = {{"walk", walk, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};

int add_walk(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}

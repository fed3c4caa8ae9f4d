/* The steps of the relay that every token takes, compiled: read, look for the end, write, count.
 *
 * Each type does what its namesake in Python does, to the byte, and hands all that is not usual back to Python:
 *   Writer  http/direct.py   send what the kernel takes, the transport the rest
 *   Tap     http/tap.py      take what is there of a body and hand whole chunks straight to their taker
 *   Lane    frontend/lane.py pass on a piece that ends as a token does, count it, keep it
 * tests/contract/test_native_relay.py runs the same cases against both. Sockets are non-blocking: the lock is kept.
 * Descriptors are asked of their socket each time: one that was closed is never another connection's.
 */
#include "native.h"

#include <structmember.h>

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { READ_BYTES = 64 * 1024, SIZE_DIGITS = 7 };
static const char EVENT[] = "data: ";
static char received[READ_BYTES]; /* emptied into an object before any Python runs */

/* Names that are looked up in Python objects. */
static PyObject *n_write, *n_counts, *n_bounds, *n_total, *n_append;
static PyObject *n_body_received, *n_between_chunks, *n_reading_ended, *n_reading_failed, *n_taking_failed;

/* Of a call that gives nothing back; -1: it raised. */
static int done(PyObject *result)
{
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

static int truth_of(PyObject *result)
{
    int truth = result == NULL ? -1 : PyObject_IsTrue(result);
    Py_XDECREF(result);
    return truth;
}

/* A socket's descriptor, -1 once it is closed; -2: it raised. */
static int descriptor(PyObject *fileno)
{
    PyObject *number = PyObject_CallNoArgs(fileno);
    if (number == NULL)
        return -2;
    long value = PyLong_AsLong(number);
    Py_DECREF(number);
    return value == -1 && PyErr_Occurred() ? -2 : (int)value;
}

/* What the garbage collector asks of a type; OBJECTS names the objects it holds. */
#define MEMBER(name) PyObject *name;
#define CLEAR(name) Py_CLEAR(self->name);
#define VISIT(name) Py_VISIT(self->name);
#define COLLECTED(Type, OBJECTS)                                                                                  \
    static int Type##_clear(PyObject *object)                                                                     \
    {                                                                                                             \
        Type *self = (Type *)object;                                                                              \
        OBJECTS(CLEAR)                                                                                            \
        return 0;                                                                                                 \
    }                                                                                                             \
    static int Type##_traverse(PyObject *object, visitproc visit, void *arg)                                      \
    {                                                                                                             \
        Type *self = (Type *)object;                                                                              \
        Py_VISIT(Py_TYPE(object));                                                                                \
        OBJECTS(VISIT)                                                                                            \
        return 0;                                                                                                 \
    }                                                                                                             \
    static void Type##_dealloc(PyObject *object)                                                                  \
    {                                                                                                             \
        PyTypeObject *type = Py_TYPE(object);                                                                     \
        PyObject_GC_UnTrack(object);                                                                              \
        Type##_clear(object);                                                                                     \
        ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);                                                     \
        Py_DECREF(type);                                                                                          \
    }

/* ---------------------------------------------------------------- Writer(fileno, waiting, rest) */

#define WRITER_OBJECTS(X) X(fileno) X(waiting) X(rest)
typedef struct {
    PyObject_HEAD
    WRITER_OBJECTS(MEMBER)
} Writer;

COLLECTED(Writer, WRITER_OBJECTS)

static int Writer_init(PyObject *object, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    Writer *self = (Writer *)object;
    PyObject *fileno, *waiting, *rest;
    if (!PyArg_ParseTuple(args, "OOO", &fileno, &waiting, &rest))
        return -1;
    Writer_clear(object);
    self->fileno = Py_NewRef(fileno);
    self->waiting = Py_NewRef(waiting);
    self->rest = Py_NewRef(rest);
    return 0;
}

static PyObject *Writer_write(PyObject *object, PyObject *data)
{
    Writer *self = (Writer *)object;
    int waiting = truth_of(PyObject_CallNoArgs(self->waiting));
    if (waiting < 0)
        return NULL;
    if (waiting || !PyBytes_Check(data)) /* what comes before this has not gone; or an unusual kind of bytes */
        return PyObject_CallFunctionObjArgs(self->rest, data, NULL);
    char *bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(data, &bytes, &size) < 0)
        return NULL;
    int fd = descriptor(self->fileno);
    if (fd == -2)
        return NULL;
    ssize_t sent = send(fd, bytes, (size_t)size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent == size)
        Py_RETURN_NONE;
    if (sent <= 0) /* no room: the transport waits for it; a lost connection: the transport tells */
        return PyObject_CallFunctionObjArgs(self->rest, data, NULL);
    PyObject *left = PyBytes_FromStringAndSize(bytes + sent, size - sent);
    if (left == NULL)
        return NULL;
    PyObject *result = PyObject_CallFunctionObjArgs(self->rest, left, NULL);
    Py_DECREF(left);
    return result;
}

static PyMethodDef Writer_methods[] = {{"write", Writer_write, METH_O, NULL}, {NULL, NULL, 0, NULL}};
static PyType_Slot Writer_slots[] = {{Py_tp_init, Writer_init},         {Py_tp_clear, Writer_clear},
                                     {Py_tp_traverse, Writer_traverse}, {Py_tp_dealloc, Writer_dealloc},
                                     {Py_tp_methods, Writer_methods},   {0, NULL}};
static PyType_Spec Writer_spec = {"dynctl.native._compiled.Writer", sizeof(Writer), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, Writer_slots};

/* ---------------------------------------------------------------- Tap(fileno, taker) */

#define TAP_OBJECTS(X) X(fileno) X(taker) X(feed)
typedef struct {
    PyObject_HEAD
    TAP_OBJECTS(MEMBER)
    char active, heard, between;
} Tap;

COLLECTED(Tap, TAP_OBJECTS)

static int Tap_init(PyObject *object, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    Tap *self = (Tap *)object;
    PyObject *fileno, *taker;
    if (!PyArg_ParseTuple(args, "OO", &fileno, &taker))
        return -1;
    Tap_clear(object);
    self->fileno = Py_NewRef(fileno);
    self->taker = Py_NewRef(taker);
    self->active = self->heard = self->between = 0;
    return 0;
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 'a' ^ 'A';
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Whether these bytes are whole chunks and no more, none of them the last one, nor with anything unusual. */
static bool whole_chunks(const char *at, Py_ssize_t size)
{
    const char *end = at + size;
    while (at < end) {
        ptrdiff_t length = 0;
        int digits = 0, digit;
        while (at < end && (digit = hex_digit(*at)) >= 0) {
            if (++digits > SIZE_DIGITS)
                return false;
            length = length * 16 + digit;
            at++;
        }
        if (length == 0 || end - at < length + 4)
            return false;
        if (memcmp(at, "\r\n", 2) != 0 || memcmp(at + 2 + length, "\r\n", 2) != 0)
            return false;
        at += length + 4;
    }
    return true;
}

static int look_between(Tap *self)
{
    int between = truth_of(PyObject_CallMethodObjArgs(self->taker, n_between_chunks, NULL));
    self->between = between > 0;
    return between < 0 ? -1 : 0;
}

/* The taker is told of what was raised while it took a piece; the exception goes on. */
static PyObject *taking_failed(Tap *self)
{
    PyObject *type, *value, *trace;
    if (!PyErr_ExceptionMatches(PyExc_Exception))
        return NULL;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (trace != NULL && value != NULL)
        PyException_SetTraceback(value, trace);
    if (done(PyObject_CallMethodObjArgs(self->taker, n_taking_failed, value != NULL ? value : Py_None, NULL)) < 0)
        PyErr_WriteUnraisable(self->taker);
    PyErr_Restore(type, value, trace);
    return NULL;
}

static int reading_failed(Tap *self, int code)
{
    PyObject *error = PyObject_CallFunction(PyExc_OSError, "is", code, strerror(code));
    if (error == NULL)
        return -1;
    int told = done(PyObject_CallMethodObjArgs(self->taker, n_reading_failed, error, NULL));
    Py_DECREF(error);
    return told;
}

static int reading_ended(Tap *self)
{
    return done(PyObject_CallMethodObjArgs(self->taker, n_reading_ended, NULL));
}

static int take(Tap *self, PyObject *data, const char *bytes, Py_ssize_t size)
{
    if (self->between && self->feed != NULL && self->feed != Py_None && whole_chunks(bytes, size)) {
        self->heard = 1;
        PyObject *feed = Py_NewRef(self->feed); /* it may be replaced meanwhile */
        int taken = done(PyObject_CallFunctionObjArgs(feed, data, NULL));
        Py_DECREF(feed);
        return taken;
    }
    return done(PyObject_CallMethodObjArgs(self->taker, n_body_received, data, NULL)) < 0 ? -1 : look_between(self);
}

static PyObject *Tap_readable(PyObject *object, PyObject *Py_UNUSED(nothing))
{
    Tap *self = (Tap *)object;
    while (self->active) {
        int fd = descriptor(self->fileno);
        if (fd == -2)
            return NULL;
        ssize_t size = recv(fd, received, READ_BYTES, MSG_DONTWAIT);
        if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            break;
        if (size <= 0) {
            int code = errno;
            if ((size < 0 ? reading_failed(self, code) : reading_ended(self)) < 0)
                return NULL;
            break;
        }
        PyObject *data = PyBytes_FromStringAndSize(received, size);
        if (data == NULL)
            return NULL;
        int taken = take(self, data, PyBytes_AsString(data), size);
        Py_DECREF(data);
        if (taken < 0)
            return taking_failed(self);
        if (size < READ_BYTES)
            break;
    }
    Py_RETURN_NONE;
}

static PyObject *Tap_begin(PyObject *object, PyObject *feed)
{
    Tap *self = (Tap *)object;
    PyObject *before = self->feed;
    self->feed = Py_NewRef(feed);
    Py_XDECREF(before);
    self->active = 1;
    if (look_between(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyMemberDef Tap_members[] = {{"feed", T_OBJECT, offsetof(Tap, feed), 0, NULL},
                                    {"active", T_BOOL, offsetof(Tap, active), 0, NULL},
                                    {"heard", T_BOOL, offsetof(Tap, heard), 0, NULL},
                                    {NULL, 0, 0, 0, NULL}};
static PyMethodDef Tap_methods[] = {{"begin", Tap_begin, METH_O, NULL},
                                    {"readable", Tap_readable, METH_NOARGS, NULL},
                                    {NULL, NULL, 0, NULL}};
static PyType_Slot Tap_slots[] = {{Py_tp_init, Tap_init},         {Py_tp_clear, Tap_clear},
                                  {Py_tp_traverse, Tap_traverse}, {Py_tp_dealloc, Tap_dealloc},
                                  {Py_tp_methods, Tap_methods},   {Py_tp_members, Tap_members},
                                  {0, NULL}};
static PyType_Spec Tap_spec = {"dynctl.native._compiled.Tap", sizeof(Tap), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, Tap_slots};

/* ---------------------------------------------------------------- Lane(exchange, itl, unusual, fold, full, usual) */

#define LANE_OBJECTS(X) X(exchange) X(itl) X(unusual) X(fold) X(usual) X(pieces)
typedef struct {
    PyObject_HEAD
    LANE_OBJECTS(MEMBER)
    Py_ssize_t full, events;
    double last_s;
} Lane;

COLLECTED(Lane, LANE_OBJECTS)

static int Lane_init(PyObject *object, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    Lane *self = (Lane *)object;
    PyObject *exchange, *itl, *unusual, *fold, *usual;
    Py_ssize_t full;
    if (!PyArg_ParseTuple(args, "OOOOnO", &exchange, &itl, &unusual, &fold, &full, &usual))
        return -1;
    PyObject *pieces = PyList_New(0);
    if (pieces == NULL)
        return -1;
    Lane_clear(object);
    self->exchange = Py_NewRef(exchange);
    self->itl = Py_NewRef(itl);
    self->unusual = Py_NewRef(unusual);
    self->fold = Py_NewRef(fold);
    self->usual = Py_NewRef(usual);
    self->pieces = pieces;
    self->full = full;
    self->events = 0;
    self->last_s = 0.0;
    return 0;
}

static Py_ssize_t count_events(const char *at, Py_ssize_t size)
{
    const size_t length = sizeof EVENT - 1;
    const char *end = at + size;
    Py_ssize_t found = 0;
    while ((at = memmem(at, (size_t)(end - at), EVENT, length)) != NULL) {
        found++;
        at += length;
    }
    return found;
}

/* bisect_left. -1: it raised. */
static Py_ssize_t place_of(PyObject *bounds, double value)
{
    Py_ssize_t low = 0, high = PyTuple_Size(bounds);
    if (high < 0)
        return -1;
    while (low < high) {
        Py_ssize_t middle = (low + high) / 2;
        double bound = PyFloat_AsDouble(PyTuple_GetItem(bounds, middle));
        if (bound == -1.0 && PyErr_Occurred())
            return -1;
        if (bound < value)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static int add_to_count(PyObject *counts, Py_ssize_t place, Py_ssize_t events)
{
    PyObject *count = PyList_GetItem(counts, place); /* borrowed */
    if (count == NULL)
        return -1;
    long long before = PyLong_AsLongLong(count);
    if (before == -1 && PyErr_Occurred())
        return -1;
    PyObject *after = PyLong_FromLongLong(before + events);
    return after == NULL ? -1 : PyList_SetItem(counts, place, after);
}

static int add_to_total(PyObject *itl, PyObject *total, double waited_s)
{
    double before = PyFloat_AsDouble(total);
    if (before == -1.0 && PyErr_Occurred())
        return -1;
    PyObject *after = PyFloat_FromDouble(before + waited_s);
    if (after == NULL)
        return -1;
    int set = PyObject_SetAttr(itl, n_total, after);
    Py_DECREF(after);
    return set;
}

/* `Histogram.observe(waited_s / events, events)`. */
static int observe(PyObject *itl, double waited_s, Py_ssize_t events)
{
    int added = -1;
    PyObject *bounds = PyObject_GetAttr(itl, n_bounds);
    PyObject *counts = PyObject_GetAttr(itl, n_counts);
    PyObject *total = PyObject_GetAttr(itl, n_total);
    if (bounds != NULL && counts != NULL && total != NULL) {
        Py_ssize_t place = place_of(bounds, waited_s / (double)events);
        if (place >= 0 && add_to_count(counts, place, events) == 0)
            added = add_to_total(itl, total, waited_s);
    }
    Py_XDECREF(bounds);
    Py_XDECREF(counts);
    Py_XDECREF(total);
    return added;
}

static int keep(Lane *self, PyObject *data)
{
    PyObject *pieces = self->pieces;
    if (!PyList_Check(pieces)) /* a deque that keeps the last ones only */
        return done(PyObject_CallMethodObjArgs(pieces, n_append, data, NULL));
    if (PyList_Append(pieces, data) < 0)
        return -1;
    if (PyList_Size(pieces) != self->full)
        return 0;
    return done(PyObject_CallNoArgs(self->fold));
}

static PyObject *Lane_feed(PyObject *object, PyObject *data)
{
    Lane *self = (Lane *)object;
    char *bytes, *tail;
    Py_ssize_t size, length;
    if (PyBytes_AsStringAndSize(data, &bytes, &size) < 0 || PyBytes_AsStringAndSize(self->usual, &tail, &length) < 0)
        return NULL;
    if (size < length || memcmp(bytes + size - length, tail, (size_t)length) != 0)
        return PyObject_CallFunctionObjArgs(self->unusual, data, NULL);
    if (done(PyObject_CallMethodObjArgs(self->exchange, n_write, data, NULL)) < 0)
        return NULL;
    Py_ssize_t events = count_events(bytes, size);
    if (events) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        double now_s = (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
        self->events += events;
        if (observe(self->itl, now_s - self->last_s, events) < 0)
            return NULL;
        self->last_s = now_s;
    }
    if (keep(self, data) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyMemberDef Lane_members[] = {{"usual", T_OBJECT_EX, offsetof(Lane, usual), 0, NULL},
                                     {"pieces", T_OBJECT_EX, offsetof(Lane, pieces), 0, NULL},
                                     {"events", T_PYSSIZET, offsetof(Lane, events), 0, NULL},
                                     {"last_s", T_DOUBLE, offsetof(Lane, last_s), 0, NULL},
                                     {NULL, 0, 0, 0, NULL}};
static PyMethodDef Lane_methods[] = {{"feed", Lane_feed, METH_O, NULL}, {NULL, NULL, 0, NULL}};
static PyType_Slot Lane_slots[] = {{Py_tp_init, Lane_init},         {Py_tp_clear, Lane_clear},
                                   {Py_tp_traverse, Lane_traverse}, {Py_tp_dealloc, Lane_dealloc},
                                   {Py_tp_methods, Lane_methods},   {Py_tp_members, Lane_members},
                                   {0, NULL}};
static PyType_Spec Lane_spec = {"dynctl.native._compiled.Lane", sizeof(Lane), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, Lane_slots};

/* ---------------------------------------------------------------- for the module */

static int name(PyObject **where, const char *text)
{
    *where = PyUnicode_InternFromString(text);
    return *where == NULL ? -1 : 0;
}

int add_relay(PyObject *module)
{
    return name(&n_write, "write") < 0 || name(&n_counts, "counts") < 0 || name(&n_bounds, "bounds") < 0 ||
                   name(&n_total, "total") < 0 || name(&n_append, "append") < 0 ||
                   name(&n_body_received, "body_received") < 0 ||
                   name(&n_between_chunks, "between_chunks") < 0 || name(&n_reading_ended, "reading_ended") < 0 ||
                   name(&n_reading_failed, "reading_failed") < 0 ||
                   name(&n_taking_failed, "taking_failed") < 0 || add_type(module, "Writer", &Writer_spec) < 0 ||
                   add_type(module, "Tap", &Tap_spec) < 0 || add_type(module, "Lane", &Lane_spec) < 0
               ? -1
               : 0;
}

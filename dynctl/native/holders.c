/* Who holds which blocks, compiled: see kv/holders.py, which does the same; tests/unit/test_kv_holders.py runs the
 * same cases against both. Nothing here runs Python's code, so nothing changes while it works.
 */
#include "native.h"

#include "blocks.h"
#include "sets.h"

#include <string.h>

enum { BATCH = 64, LOOKS = 16, FEW_WORDS = 16 };
#define MOST_PLACES (1 << 20)

typedef struct {
    PyObject_HEAD
    int made;
    Blocks blocks;
    Sets sets;
    uint64_t *counts; /* blocks by place */
    size_t places;
    size_t clearing; /* the place + 1 that `clear` is about, from `blocks.cursor` on */
} Holders;

static int Holders_init(PyObject *object, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    Holders *self = (Holders *)object;
    unsigned long long seed;
    if (!PyArg_ParseTuple(args, "K", &seed))
        return -1;
    if (self->made) {
        PyErr_SetString(PyExc_TypeError, "it is made already");
        return -1;
    }
    self->made = 1;
    self->blocks.seed = seed | 1;
    sets_begin(&self->sets);
    return 0;
}

static void Holders_dealloc(PyObject *object)
{
    Holders *self = (Holders *)object;
    blocks_end(&self->blocks);
    sets_end(&self->sets);
    PyMem_Free(self->counts);
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static Py_ssize_t Holders_length(PyObject *object)
{
    return (Py_ssize_t)((Holders *)object)->blocks.live;
}

/* See to it that there is `place`; -1: it raised. */
static int know(Holders *self, Py_ssize_t place)
{
    if (!self->made || place < 0 || place >= MOST_PLACES) {
        PyErr_Format(PyExc_IndexError, "no such place: %zd", place);
        return -1;
    }
    if ((size_t)place < self->places)
        return 0;
    size_t places = (size_t)place + 1;
    uint64_t *counts = NULL;
    if (sets_widen(&self->sets, (size_t)place / 64 + 1) == 0)
        counts = PyMem_Realloc(self->counts, places * sizeof(uint64_t));
    if (counts == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    memset(counts + self->places, 0, (places - self->places) * sizeof(uint64_t));
    self->counts = counts;
    self->places = places;
    return 0;
}

/* Up to BATCH hashes of a list from `at` on; how many, -1: it raised. It ends before a number that is no hash of a block,
 * being of more than 64 bits, and says so in `foreign`; NULL: that raises.
 */
static Py_ssize_t batch(const Holders *self, PyObject *hashes, Py_ssize_t at, uint64_t *found, int *foreign)
{
    Py_ssize_t count = PyList_Size(hashes) - at;
    count = count > BATCH ? BATCH : count;
    for (Py_ssize_t i = 0; i < count; i++) {
        found[i] = PyLong_AsUnsignedLongLong(PyList_GetItem(hashes, at + i));
        if (found[i] == (uint64_t)-1 && PyErr_Occurred()) {
            if (foreign == NULL || !PyErr_ExceptionMatches(PyExc_OverflowError))
                return -1;
            PyErr_Clear();
            *foreign = 1;
            count = i;
        }
    }
    blocks_prefetch(&self->blocks, found, (size_t)count);
    return count;
}

/* Words for one set to be made in: `few` where it is enough. NULL: it raised. */
static uint64_t *scratch_for(const Holders *self, uint64_t *few)
{
    size_t words = self->sets.words;
    uint64_t *scratch = words > FEW_WORDS ? PyMem_Malloc(words * sizeof(uint64_t)) : few;
    if (scratch == NULL)
        PyErr_NoMemory();
    return scratch;
}

static void end_scratch(uint64_t *scratch, const uint64_t *few)
{
    if (scratch != few)
        PyMem_Free(scratch);
}

/* A change of one set into another, kept for the blocks that follow: neighbours mostly have the same holders. A
 * reference to `after` is held meanwhile.
 */
typedef struct {
    int known;
    uint32_t before, after;
} Step;

static void forget(Sets *sets, Step *step)
{
    if (step->known && step->after != NO_SET)
        sets_release(sets, step->after);
    step->known = 0;
}

/* Have `place` hold one block or, `add` 0, hold it no more; -1: it raised. */
static int change(Holders *self, uint64_t hash, size_t place, int add, Step *step, uint64_t *scratch)
{
    Sets *sets = &self->sets;
    Slot *slot = blocks_find(&self->blocks, hash);
    uint32_t set = slot == NULL ? NO_SET : *blocks_set(&self->blocks, slot);
    if ((set != NO_SET && sets_has(sets, set, place)) == add)
        return 0;
    if (slot == NULL && blocks_make_room(&self->blocks) < 0)
        goto no_memory;
    if (!step->known || set != step->before) {
        forget(sets, step);
        if (sets_turned(sets, set, place, scratch, &step->after) < 0)
            goto no_memory;
        step->before = set;
        step->known = 1;
    }
    uint32_t after = step->after;
    if (after != NO_SET)
        sets->sets[after].refs++;
    if (slot == NULL)
        blocks_put(&self->blocks, hash, after);
    else if (after == NO_SET)
        blocks_drop(&self->blocks, slot);
    else
        *blocks_set(&self->blocks, slot) = after;
    self->counts[place] += add ? 1 : (uint64_t)-1;
    if (set != NO_SET) {
        if (sets->sets[set].refs == 1)
            forget(sets, step); /* its number may soon be another's */
        sets_release(sets, set);
    }
    return 0;
no_memory:
    PyErr_NoMemory();
    return -1;
}

static PyObject *change_all(PyObject *object, PyObject *args, int add)
{
    Holders *self = (Holders *)object;
    Py_ssize_t place, count, result = 0;
    PyObject *hashes;
    uint64_t some[BATCH], few[FEW_WORDS], *scratch;
    if (!PyArg_ParseTuple(args, "nO!", &place, &PyList_Type, &hashes) || know(self, place) < 0 ||
        (scratch = scratch_for(self, few)) == NULL)
        return NULL;
    if (add && self->clearing == (size_t)place + 1)
        self->clearing = 0; /* it may hold again what was looked at */
    Step step = {.known = 0};
    for (Py_ssize_t at = 0; result == 0 && (count = batch(self, hashes, at, some, NULL)) != 0; at += count) {
        if (count < 0)
            result = -1;
        for (Py_ssize_t i = 0; result == 0 && i < count; i++)
            result = change(self, some[i], (size_t)place, add, &step, scratch);
    }
    forget(&self->sets, &step);
    end_scratch(scratch, few);
    return result < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *Holders_add(PyObject *object, PyObject *args)
{
    return change_all(object, args, 1);
}

static PyObject *Holders_discard(PyObject *object, PyObject *args)
{
    return change_all(object, args, 0);
}

static PyObject *Holders_count(PyObject *object, PyObject *arg)
{
    Holders *self = (Holders *)object;
    Py_ssize_t place = PyLong_AsSsize_t(arg);
    if (place == -1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong(place >= 0 && (size_t)place < self->places ? self->counts[place] : 0);
}

static PyObject *Holders_get(PyObject *object, PyObject *arg)
{
    Holders *self = (Holders *)object;
    uint64_t hash = PyLong_AsUnsignedLongLong(arg);
    int foreign = 0; /* of more than 64 bits: nobody holds it */
    if (hash == (uint64_t)-1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return NULL;
        PyErr_Clear();
        foreign = 1;
    }
    Slot *slot = foreign ? NULL : blocks_find(&self->blocks, hash);
    if (slot == NULL)
        return PyLong_FromLong(0);
    const char *bits = (const char *)sets_bits(&self->sets, *blocks_set(&self->blocks, slot));
    PyObject *raw = PyBytes_FromStringAndSize(bits, (Py_ssize_t)(self->sets.words * sizeof(uint64_t)));
    if (raw == NULL)
        return NULL;
    PyObject *mask = PyObject_CallMethod((PyObject *)&PyLong_Type, "from_bytes", "Os", raw, "little");
    Py_DECREF(raw);
    return mask;
}

static PyObject *Holders_evict(PyObject *object, PyObject *arg)
{
    Holders *self = (Holders *)object;
    Blocks *blocks = &self->blocks;
    Py_ssize_t most = PyLong_AsSsize_t(arg), gone = 0;
    if (most == -1 && PyErr_Occurred())
        return NULL;
    for (; gone < most && blocks->oldest < blocks->used; blocks->oldest++) {
        Entry one = blocks->entries[blocks->oldest];
        if (one.set == NO_SET)
            continue;
        for (size_t word = 0; word < self->sets.words; word++) {
            for (uint64_t bits = sets_bits(&self->sets, one.set)[word]; bits; bits &= bits - 1)
                self->counts[word * 64 + (size_t)__builtin_ctzll(bits)]--;
        }
        blocks_drop(blocks, blocks_find(blocks, one.hash));
        sets_release(&self->sets, one.set);
        gone++;
    }
    return PyLong_FromSsize_t(gone);
}

static PyObject *Holders_touch(PyObject *object, PyObject *arg)
{
    Holders *self = (Holders *)object;
    Blocks *blocks = &self->blocks;
    uint64_t some[BATCH];
    if (!PyList_Check(arg)) {
        PyErr_SetString(PyExc_TypeError, "touch takes a list");
        return NULL;
    }
    Py_ssize_t count = 0;
    int foreign = 0; /* what comes after such a one in a prompt is not here either */
    for (Py_ssize_t at = 0; !foreign && (count = batch(self, arg, at, some, &foreign)) > 0; at += count) {
        for (Py_ssize_t i = 0; i < count; i++) {
            if (blocks_find(blocks, some[i]) == NULL)
                continue;
            if (blocks_make_room(blocks) < 0)
                return PyErr_NoMemory();
            blocks_renew(blocks, blocks_find(blocks, some[i])); /* found anew: it may have moved */
        }
    }
    return count < 0 ? NULL : Py_NewRef(Py_None);
}

/* Take `place` off the block at the cursor; whether it was on it, -1: it raised. */
static int clear_next(Holders *self, size_t place, uint64_t *scratch)
{
    Entry *entry = &self->blocks.entries[self->blocks.cursor];
    uint32_t before = entry->set, after;
    if (before == NO_SET || !sets_has(&self->sets, before, place))
        return 0;
    if (sets_turned(&self->sets, before, place, scratch, &after) < 0) {
        PyErr_NoMemory();
        return -1;
    }
    if (after == NO_SET)
        blocks_drop(&self->blocks, blocks_find(&self->blocks, entry->hash));
    else
        entry->set = after;
    sets_release(&self->sets, before);
    self->counts[place]--;
    return 1;
}

static PyObject *Holders_clear(PyObject *object, PyObject *args)
{
    Holders *self = (Holders *)object;
    Py_ssize_t place, budget;
    uint64_t few[FEW_WORDS], *scratch;
    if (!PyArg_ParseTuple(args, "nn", &place, &budget) || know(self, place) < 0 ||
        (scratch = scratch_for(self, few)) == NULL)
        return NULL;
    if (self->clearing != (size_t)place + 1)
        self->blocks.cursor = 0;
    self->clearing = (size_t)place + 1;
    Py_ssize_t looks = budget > PY_SSIZE_T_MAX / LOOKS ? PY_SSIZE_T_MAX : budget * LOOKS;
    int done = 0;
    for (; done >= 0 && looks > 0 && self->counts[place] && self->blocks.cursor < self->blocks.used;
         self->blocks.cursor += done >= 0) {
        done = clear_next(self, (size_t)place, scratch);
        looks -= done > 0 ? LOOKS : 1;
    }
    if (self->counts[place] == 0)
        self->clearing = 0;
    end_scratch(scratch, few);
    return done < 0 ? NULL : PyLong_FromSsize_t(looks > 0 ? looks / LOOKS : 0);
}

static void settle(const uint64_t *gone, size_t words, Py_ssize_t at, Py_ssize_t *found)
{
    for (size_t word = 0; word < words; word++) {
        for (uint64_t bits = gone[word]; bits; bits &= bits - 1)
            found[word * 64 + (size_t)__builtin_ctzll(bits)] = at;
    }
}

/* Leave in `alive` those that are in `set`, too; the others have come as far as `at`. Returns whether any are left. */
static int part(const Holders *self, uint32_t set, uint64_t *alive, uint64_t *gone, Py_ssize_t at, Py_ssize_t *found)
{
    uint64_t living = 0, going = 0;
    for (size_t word = 0; word < self->sets.words; word++) {
        uint64_t still = set == NO_SET ? 0 : alive[word] & sets_bits(&self->sets, set)[word];
        gone[word] = alive[word] ^ still;
        alive[word] = still;
        living |= still;
        going |= gone[word];
    }
    if (going)
        settle(gone, self->sets.words, at, found);
    return living != 0;
}

/* How far each of `alive` has `hashes`: into `found`; -1: it raised. */
static int follow(const Holders *self, PyObject *hashes, uint64_t *alive, uint64_t *gone, Py_ssize_t *found)
{
    uint64_t some[BATCH];
    uint32_t last = NO_SET - 1; /* no set has that number */
    Py_ssize_t count = 0, at = 0;
    int foreign = 0;
    for (; !foreign && (count = batch(self, hashes, at, some, &foreign)) > 0; at += count) {
        for (Py_ssize_t i = 0; i < count; i++) {
            Slot *slot = blocks_find(&self->blocks, some[i]);
            uint32_t set = slot == NULL ? NO_SET : *blocks_set(&self->blocks, slot);
            if (set != last && !part(self, set, alive, gone, at + i, found))
                return 0;
            last = set;
        }
    }
    settle(alive, self->sets.words, at, found);
    return count < 0 ? -1 : 0;
}

static PyObject *Holders_walk(PyObject *object, PyObject *args)
{
    Holders *self = (Holders *)object;
    PyObject *hashes, *depths = NULL;
    const char *mask;
    Py_ssize_t mask_size, size;
    if (!PyArg_ParseTuple(args, "O!y#n", &PyList_Type, &hashes, &mask, &mask_size, &size))
        return NULL;
    size_t words = self->sets.words, within = words * sizeof(uint64_t);
    uint64_t *alive = PyMem_Calloc(2 * words + 1, sizeof(uint64_t));
    Py_ssize_t *found = PyMem_Calloc(64 * words + 1, sizeof(Py_ssize_t));
    if (alive == NULL || found == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    memcpy(alive, mask, (size_t)mask_size < within ? (size_t)mask_size : within);
    if (follow(self, hashes, alive, alive + words, found) < 0)
        goto done;
    depths = PyList_New(size);
    for (Py_ssize_t place = 0; depths != NULL && place < size; place++) {
        PyObject *depth = PyLong_FromSsize_t((size_t)place < words * 64 ? found[place] : 0);
        if (depth == NULL || PyList_SetItem(depths, place, depth) < 0)
            Py_CLEAR(depths);
    }
done:
    PyMem_Free(alive);
    PyMem_Free(found);
    return depths;
}

static PyMethodDef methods[] = {
    {"add", Holders_add, METH_VARARGS, NULL},     {"discard", Holders_discard, METH_VARARGS, NULL},
    {"count", Holders_count, METH_O, NULL},       {"get", Holders_get, METH_O, NULL},
    {"evict", Holders_evict, METH_O, NULL},       {"touch", Holders_touch, METH_O, NULL},
    {"clear", Holders_clear, METH_VARARGS, NULL}, {"walk", Holders_walk, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_init, Holders_init},     {Py_tp_dealloc, Holders_dealloc}, {Py_tp_new, PyType_GenericNew},
    {Py_sq_length, Holders_length}, {Py_tp_methods, methods},         {0, NULL},
};

static PyType_Spec spec = {"dynctl.native._compiled.Holders", sizeof(Holders), 0, Py_TPFLAGS_DEFAULT, slots};

int add_holders(PyObject *module)
{
    return add_type(module, "Holders", &spec);
}

#include "sets.h"

#include "native.h"

#include <string.h>

enum { FIRST = 64 };

void sets_begin(Sets *self)
{
    *self = (Sets){.words = 1, .free = NO_SET};
}

void sets_end(Sets *self)
{
    PyMem_Free(self->sets);
    PyMem_Free(self->bits);
    PyMem_Free(self->chains);
}

static uint64_t mix(uint64_t mixed)
{
    mixed *= 0x9E3779B97F4A7C15u;
    return mixed ^ mixed >> 32;
}

/* Mixed once more at the end: a product's low bits, which choose the chain, hang on the lower bits alone. */
static uint64_t digest(const uint64_t *bits, size_t words)
{
    uint64_t mixed = 0;
    for (size_t i = 0; i < words; i++)
        mixed = mix(mixed ^ bits[i]);
    return mix(mixed);
}

static uint32_t *chain_of(const Sets *self, uint64_t mixed)
{
    return &self->chains[mixed & (self->room - 1)];
}

static void chain(Sets *self, uint32_t set)
{
    uint32_t *head = chain_of(self, self->sets[set].digest);
    self->sets[set].next = *head;
    *head = set;
}

/* Chains anew: after the sets have become more, or longer. */
static void chain_all(Sets *self)
{
    memset(self->chains, 0xFF, self->room * sizeof(uint32_t));
    for (uint32_t set = 0; set < self->count; set++) {
        if (self->sets[set].refs) {
            self->sets[set].digest = digest(sets_bits(self, set), self->words);
            chain(self, set);
        }
    }
}

/* Room for twice the sets; -1: no memory. */
static int grow(Sets *self)
{
    size_t room = self->room ? self->room * 2 : FIRST;
    Set *sets = PyMem_Realloc(self->sets, room * sizeof(Set));
    if (sets == NULL)
        return -1;
    self->sets = sets;
    uint64_t *bits = PyMem_Realloc(self->bits, room * self->words * sizeof(uint64_t));
    if (bits == NULL)
        return -1;
    self->bits = bits;
    uint32_t *chains = PyMem_Realloc(self->chains, room * sizeof(uint32_t));
    if (chains == NULL)
        return -1;
    self->chains = chains;
    self->room = room;
    chain_all(self);
    return 0;
}

int sets_widen(Sets *self, size_t words)
{
    if (words <= self->words)
        return 0;
    if (self->room) {
        uint64_t *bits = PyMem_Calloc(self->room * words, sizeof(uint64_t));
        if (bits == NULL)
            return -1;
        for (size_t set = 0; set < self->count; set++)
            memcpy(bits + set * words, sets_bits(self, (uint32_t)set), self->words * sizeof(uint64_t));
        PyMem_Free(self->bits);
        self->bits = bits;
    }
    self->words = words;
    if (self->room)
        chain_all(self);
    return 0;
}

/* The set with these bits, with one reference more; NO_SET: no memory. */
static uint32_t intern(Sets *self, const uint64_t *bits)
{
    size_t size = self->words * sizeof(uint64_t);
    uint64_t mixed = digest(bits, self->words);
    uint32_t set = self->room ? *chain_of(self, mixed) : NO_SET;
    for (; set != NO_SET; set = self->sets[set].next) {
        if (self->sets[set].digest == mixed && memcmp(sets_bits(self, set), bits, size) == 0) {
            self->sets[set].refs++;
            return set;
        }
    }
    set = self->free;
    if (set == NO_SET) {
        if (self->count == self->room && grow(self) < 0)
            return NO_SET;
        set = (uint32_t)self->count++;
    } else {
        self->free = self->sets[set].next;
    }
    self->sets[set] = (Set){.refs = 1, .digest = mixed};
    memcpy(self->bits + (size_t)set * self->words, bits, size);
    chain(self, set);
    return set;
}

void sets_release(Sets *self, uint32_t set)
{
    if (--self->sets[set].refs)
        return;
    uint32_t *link = chain_of(self, self->sets[set].digest);
    while (*link != set)
        link = &self->sets[*link].next;
    *link = self->sets[set].next;
    self->sets[set].next = self->free;
    self->free = set;
}

int sets_turned(Sets *self, uint32_t set, size_t place, uint64_t *scratch, uint32_t *made)
{
    if (set == NO_SET)
        memset(scratch, 0, self->words * sizeof(uint64_t));
    else
        memcpy(scratch, sets_bits(self, set), self->words * sizeof(uint64_t));
    scratch[place / 64] ^= (uint64_t)1 << (place % 64);
    uint64_t any = 0;
    for (size_t i = 0; i < self->words; i++)
        any |= scratch[i];
    *made = any ? intern(self, scratch) : NO_SET;
    return any && *made == NO_SET ? -1 : 0;
}

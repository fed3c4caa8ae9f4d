/* Sets of places, each there once, known by number: what native/holders.c keeps for each block. */
#ifndef DYNCTL_SETS_H
#define DYNCTL_SETS_H

#include <stddef.h>
#include <stdint.h>

#define NO_SET UINT32_MAX /* the empty set; the end of a chain */

typedef struct {
    uint64_t refs, digest;
    uint32_t next; /* in its chain, or among the free ones */
} Set;

typedef struct {
    Set *sets;
    uint64_t *bits; /* `words` for each set */
    uint32_t *chains;
    size_t count, room, words;
    uint32_t free;
} Sets;

void sets_begin(Sets *self);
void sets_end(Sets *self);
int sets_widen(Sets *self, size_t words); /* from now on sets have so many words; -1: no memory */
void sets_release(Sets *self, uint32_t set);

/* The set that is `set` with one bit turned, with one reference more, into `made`; NO_SET: it is empty. -1: no memory.
 * `scratch`: `words` words.
 */
int sets_turned(Sets *self, uint32_t set, size_t place, uint64_t *scratch, uint32_t *made);

static inline const uint64_t *sets_bits(const Sets *self, uint32_t set)
{
    return self->bits + (size_t)set * self->words;
}

static inline int sets_has(const Sets *self, uint32_t set, size_t place)
{
    return sets_bits(self, set)[place / 64] >> (place % 64) & 1;
}

#endif

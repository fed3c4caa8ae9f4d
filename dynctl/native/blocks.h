/* Blocks in the order they came, found by their hash: what native/holders.c keeps.
 *
 * 16 bytes each: the hash and the number of the set of its holders. An open hash table beside them leads from a hash to
 * its entry. Those that went leave gaps, which are closed when there is no room.
 */
#ifndef DYNCTL_BLOCKS_H
#define DYNCTL_BLOCKS_H

#include <stddef.h>
#include <stdint.h>

#include "sets.h"

typedef struct {
    uint64_t hash;
    uint32_t set; /* NO_SET: a gap */
} Entry;

typedef struct {
    uint32_t tag, entry; /* entry: its number + 1, 0 = free */
} Slot;

typedef struct {
    uint64_t seed; /* odd; nobody knows it, so that collisions cannot be chosen */
    Entry *entries;
    Slot *slots;
    size_t used, live, room; /* entries: up to where, without gaps, at most */
    size_t last;             /* slots - 1 */
    unsigned shift;          /* of a tag, so that its highest bits are left: `last` at most */
    size_t oldest, cursor;   /* entries to go on from: only gaps before `oldest` */
} Blocks;

void blocks_end(Blocks *self);
int blocks_make_room(Blocks *self); /* for one more; entries and slots may move. -1: no memory */
void blocks_put(Blocks *self, uint64_t hash, uint32_t set); /* a new one; there must be room */
void blocks_drop(Blocks *self, Slot *slot);
void blocks_renew(Blocks *self, Slot *slot); /* as if it had come just now; there must be room */

static inline uint32_t blocks_tag(const Blocks *self, uint64_t hash)
{
    return (uint32_t)((hash * self->seed) >> 32);
}

/* The slot where the search for a tag begins: by the highest bits of the product, which hang on all of a hash. */
static inline size_t blocks_home(const Blocks *self, uint32_t tag)
{
    return tag >> self->shift;
}

/* Where it is; NULL: it is not there. */
static inline Slot *blocks_find(const Blocks *self, uint64_t hash)
{
    if (self->slots == NULL)
        return NULL;
    uint32_t tag = blocks_tag(self, hash);
    for (size_t at = blocks_home(self, tag);; at = (at + 1) & self->last) {
        Slot *slot = &self->slots[at];
        if (slot->entry == 0)
            return NULL;
        if (slot->tag == tag && self->entries[slot->entry - 1].hash == hash)
            return slot;
    }
}

static inline uint32_t *blocks_set(const Blocks *self, const Slot *slot)
{
    return &self->entries[slot->entry - 1].set;
}

/* Have what `find` will read of these fetched from memory, all at once. */
static inline void blocks_prefetch(const Blocks *self, const uint64_t *hashes, size_t count)
{
    if (self->slots == NULL)
        return;
    for (size_t i = 0; i < count; i++)
        __builtin_prefetch(&self->slots[blocks_home(self, blocks_tag(self, hashes[i]))]);
    for (size_t i = 0; i < count; i++) {
        const Slot *slot = &self->slots[blocks_home(self, blocks_tag(self, hashes[i]))];
        if (slot->entry)
            __builtin_prefetch(&self->entries[slot->entry - 1]);
    }
}

#endif

#include "blocks.h"

#include "native.h"

#include <string.h>

enum { FIRST = 64 };
#define MOST (1u << 30)

void blocks_end(Blocks *self)
{
    PyMem_Free(self->entries);
    PyMem_Free(self->slots);
}

static void fill_slot(Blocks *self, uint64_t hash, size_t entry)
{
    uint32_t tag = blocks_tag(self, hash);
    size_t at = blocks_home(self, tag);
    while (self->slots[at].entry)
        at = (at + 1) & self->last;
    self->slots[at] = (Slot){tag, (uint32_t)entry + 1};
}

/* Free a slot, and move up those that stand behind it only because it was taken. */
static void free_slot(Blocks *self, Slot *slot)
{
    size_t hole = (size_t)(slot - self->slots), at = hole;
    for (;;) {
        at = (at + 1) & self->last;
        if (self->slots[at].entry == 0)
            break;
        size_t home = blocks_home(self, self->slots[at].tag);
        if (((at - home) & self->last) >= ((at - hole) & self->last)) {
            self->slots[hole] = self->slots[at];
            hole = at;
        }
    }
    self->slots[hole].entry = 0;
}

/* Twice the room; -1: no memory. */
static int grow(Blocks *self)
{
    size_t room = self->room ? self->room * 2 : FIRST;
    Slot *slots = room > MOST ? NULL : PyMem_Malloc(room * 2 * sizeof(Slot));
    Entry *entries = slots == NULL ? NULL : PyMem_Realloc(self->entries, room * sizeof(Entry));
    if (entries == NULL) {
        PyMem_Free(slots);
        return -1;
    }
    PyMem_Free(self->slots);
    self->slots = slots;
    self->entries = entries;
    self->room = room;
    self->last = room * 2 - 1;
    self->shift = 32 - (unsigned)__builtin_ctzll(room * 2);
    return 0;
}

int blocks_make_room(Blocks *self)
{
    if (self->used < self->room)
        return 0;
    if (self->live * 4 >= self->room * 3 && grow(self) < 0)
        return -1;
    memset(self->slots, 0, (self->last + 1) * sizeof(Slot));
    size_t kept = 0;
    for (size_t i = 0; i < self->used; i++) {
        if (self->entries[i].set != NO_SET) {
            self->entries[kept] = self->entries[i];
            fill_slot(self, self->entries[kept].hash, kept);
            kept++;
        }
    }
    self->used = kept;
    self->oldest = self->cursor = 0;
    return 0;
}

void blocks_put(Blocks *self, uint64_t hash, uint32_t set)
{
    self->entries[self->used] = (Entry){hash, set};
    fill_slot(self, hash, self->used++);
    self->live++;
}

void blocks_drop(Blocks *self, Slot *slot)
{
    *blocks_set(self, slot) = NO_SET;
    self->live--;
    free_slot(self, slot);
}

void blocks_renew(Blocks *self, Slot *slot)
{
    Entry *entry = &self->entries[slot->entry - 1];
    self->entries[self->used] = *entry;
    entry->set = NO_SET;
    slot->entry = (uint32_t)++self->used;
}

/* Dirty bitmaps to gfn arrays and back; bit 0 of word 0 is the first page (api.rst 4.8). */
#include "hot.h"

static long count_portable(const __u64 *words, size_t n)
{
    long count = 0;

    for (size_t i = 0; i < n; i++)
        count += __builtin_popcountll(words[i]);
    return count;
}

#ifdef __x86_64__
/* The baseline x86-64 has no such instruction, and without it counting takes longer than the ioctl. */
__attribute__((target("popcnt"))) static long count_popcnt(const __u64 *words, size_t n)
{
    long count = 0;

    for (size_t i = 0; i < n; i++)
        count += __builtin_popcountll(words[i]);
    return count;
}
#endif

long pykvm_bitmap_count(const __u64 *words, size_t n)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("popcnt"))
        return count_popcnt(words, n);
#endif
    return count_portable(words, n);
}

long pykvm_bitmap_to_gfns(const __u64 *words, size_t n, __u64 base, __u64 *out)
{
    __u64 *start = out;

    for (size_t i = 0; i < n; i++) {
        __u64 first = base + i * 64;

        for (__u64 word = words[i]; word; word &= word - 1)
            *out++ = first + (__u64)__builtin_ctzll(word);
    }
    return out - start;
}

/*
 * KVM_GET_DIRTY_LOG into log->bitmap, then its gfns into an array with room for that many.  Returns how many
 * pages are dirty, or an error as pykvm_ioctl does.  When they are more than room - 64 the array may hold
 * only some of them, and the caller converts the bitmap into a larger one.
 */
long pykvm_dirty_log(struct pykvm_handle *vm, const struct pykvm_dirty_log *log, __u64 *gfns, size_t room)
{
    struct kvm_dirty_log request = {.slot = log->slot, .dirty_bitmap = log->bitmap};
    const __u64 *words = log->bitmap;
    long result = pykvm_ioctl(vm, KVM_GET_DIRTY_LOG, &request);
    __u64 *out = gfns;
    size_t i = 0;

    if (result < 0)
        return result;
    while (i < log->words) {
        /* Most of a log is clean as a rule. */
        if (i + 4 <= log->words && !(words[i] | words[i + 1] | words[i + 2] | words[i + 3])) {
            i += 4;
            continue;
        }
        size_t end = i + 4 < log->words ? i + 4 : log->words;

        for (; i < end; i++) {
            if (words[i] && room - (size_t)(out - gfns) < 64)
                return out - gfns + pykvm_bitmap_count(words + i, log->words - i);
            for (__u64 word = words[i]; word; word &= word - 1)
                *out++ = log->base_gfn + i * 64 + (__u64)__builtin_ctzll(word);
        }
    }
    return out - gfns;
}

void pykvm_gfns_to_bitmap(const __u64 *gfns, size_t n, __u64 base, __u64 *words)
{
    for (size_t i = 0; i < n; i++) {
        __u64 bit = gfns[i] - base;

        words[bit / 64] |= 1ULL << (bit % 64);
    }
}

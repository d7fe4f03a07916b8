/* Dirty bitmaps to gfn arrays and back; bit 0 of word 0 is the first page (api.rst 4.8). */
#include "hot.h"

long pykvm_bitmap_count(const __u64 *words, size_t n)
{
    long count = 0;

    for (size_t i = 0; i < n; i++)
        count += __builtin_popcountll(words[i]);
    return count;
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

void pykvm_gfns_to_bitmap(const __u64 *gfns, size_t n, __u64 base, __u64 *words)
{
    for (size_t i = 0; i < n; i++) {
        __u64 bit = gfns[i] - base;

        words[bit / 64] |= 1ULL << (bit % 64);
    }
}

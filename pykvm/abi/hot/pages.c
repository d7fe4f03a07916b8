/*
 * Page contents: zero test, gather, scatter, and the stream's checksum (CRC-32C, RFC 3720 B.4).
 *
 * Gather copies first and tests and sums the copy: the guest may be writing the page meanwhile, and the
 * checksum must be that of the bytes that are sent.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "hot.h"

#define PAGE 4096

static __u32 crc_table[256];

__attribute__((constructor)) static void fill_crc_table(void)
{
    for (__u32 i = 0; i < 256; i++) {
        __u32 crc = i;

        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
        crc_table[i] = crc;
    }
}

static __u32 crc_portable(__u32 crc, const unsigned char *data, size_t n)
{
    while (n--)
        crc = crc_table[(crc ^ *data++) & 0xff] ^ crc >> 8;
    return crc;
}

#ifdef __x86_64__
__attribute__((target("sse4.2"))) static __u32 crc_sse42(__u32 crc, const unsigned char *data, size_t n)
{
    __u64 wide = crc;

    for (; n >= 8; n -= 8, data += 8) {
        __u64 word;

        memcpy(&word, data, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    crc = (__u32)wide;
    while (n--)
        crc = __builtin_ia32_crc32qi(crc, *data++);
    return crc;
}
#endif

__u32 pykvm_crc32c(__u32 crc, const void *data, size_t n)
{
    crc = ~crc;
#ifdef __x86_64__
    if (__builtin_cpu_supports("sse4.2"))
        return ~crc_sse42(crc, data, n);
#endif
    return ~crc_portable(crc, data, n);
}

int pykvm_is_zero(const void *data, size_t n)
{
    const unsigned char *bytes = data;

    if (n < 8) {
        while (n--)
            if (*bytes++)
                return 0;
        return 1;
    }
    __u64 head;
    memcpy(&head, bytes, 8);
    return head == 0 && memcmp(bytes, bytes + 8, n - 8) == 0;
}

/*
 * Copies the pages that are not all zero behind one another to out; zero[i] tells which were.  *stored is
 * the number of pages copied; the result is the CRC-32C of those bytes.  out has room for n pages.
 */
__u32 pykvm_gather(const char *memory, const __u64 *pages, size_t n, char *out, __u8 *zero, size_t *stored)
{
    __u32 crc = 0;
    char *to = out;

    for (size_t i = 0; i < n; i++) {
        memcpy(to, memory + pages[i] * PAGE, PAGE);
        zero[i] = (__u8)pykvm_is_zero(to, PAGE);
        if (!zero[i]) {
            crc = pykvm_crc32c(crc, to, PAGE);
            to += PAGE;
        }
    }
    *stored = (size_t)(to - out) / PAGE;
    return crc;
}

void pykvm_scatter(char *memory, const __u64 *pages, size_t n, const char *in)
{
    for (size_t i = 0; i < n; i++)
        memcpy(memory + pages[i] * PAGE, in + i * PAGE, PAGE);
}

/* Frees whole pages of a memfd, which then read as zeros.  Returns 0 or -errno. */
int pykvm_punch_hole(int fd, __u64 offset, __u64 length)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

    return fallocate(fd, mode, (off_t)offset, (off_t)length) ? -errno : 0;
}

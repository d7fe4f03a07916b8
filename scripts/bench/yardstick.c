/*
 * The yardstick: what a C program does with the same ioctls, and no library around it.
 *
 * Built as a shared object and loaded by the bench, so that both sides act in one process, on the same CPU
 * and, wherever the kernel's state allows it, on the same VM, in turns.  Each function times itself with
 * CLOCK_MONOTONIC and returns nanoseconds, or -errno: what the caller spends on getting here does not count.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define BLOCK ((size_t)512 << 10)

/* linux/kvm.h got the ring's layout in Linux 5.11; older headers lack it. */
#ifndef KVM_RESET_DIRTY_RINGS
#define KVM_RESET_DIRTY_RINGS _IO(KVMIO, 0xc7)
#define KVM_DIRTY_GFN_F_DIRTY 1
#define KVM_DIRTY_GFN_F_RESET 2
struct kvm_dirty_gfn {
    __u32 flags;
    __u32 slot;
    __u64 offset;
};
#endif

static int64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

void *yardstick_map(int fd, size_t size, uint64_t offset)
{
    void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);

    return map == MAP_FAILED ? NULL : map;
}

void yardstick_unmap(void *map, size_t size)
{
    munmap(map, size);
}

/* KVM_RUN until the guest touches port stop. */
int64_t yardstick_exits(int vcpu, const struct kvm_run *run, int stop)
{
    int64_t start = now();

    do {
        if (ioctl(vcpu, KVM_RUN, 0) < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (run->exit_reason != KVM_EXIT_IO)
            return -EIO;
    } while (run->io.port != stop);
    return now() - start;
}

/* n ioctls that do nothing. */
int64_t yardstick_empty_ioctls(int kvm, int n)
{
    int64_t start = now();

    while (n--)
        if (ioctl(kvm, KVM_GET_API_VERSION, 0) < 0)
            return -errno;
    return now() - start;
}

/* Takes what the ring holds from *head on, as (slot, offset), and has KVM reset it; *taken tells how much. */
int64_t yardstick_ring(int vm, struct kvm_dirty_gfn *ring, uint32_t size, uint32_t *head, uint32_t *slots,
                       uint64_t *offsets, uint32_t *taken)
{
    int64_t start = now();
    uint32_t n = 0;

    for (; n < size; n++) {
        struct kvm_dirty_gfn *entry = &ring[(*head + n) & (size - 1)];

        if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
            break;
        slots[n] = entry->slot;
        offsets[n] = entry->offset;
        __atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
    }
    for (uint32_t left = n; left;) {
        int reset = ioctl(vm, KVM_RESET_DIRTY_RINGS, 0);

        if (reset < 0)
            return -errno;
        left -= (uint32_t)reset;
    }
    *head += n;
    *taken = n;
    return now() - start;
}

/* KVM_SET_USER_MEMORY_REGION: turns logging of a slot on or off. */
int64_t yardstick_slot_flags(int vm, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size, uint64_t host)
{
    struct kvm_userspace_memory_region region = {slot, flags, gpa, size, host};
    int64_t start = now();

    if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        return -errno;
    return now() - start;
}

/* KVM_GET_DIRTY_LOG, then the bitmap as gfns; *found tells how many. */
int64_t yardstick_dirty_log(int vm, uint32_t slot, uint64_t *bitmap, size_t words, uint64_t base,
                            uint64_t *gfns, size_t *found)
{
    struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = bitmap};
    int64_t start = now();
    uint64_t *out = gfns;

    if (ioctl(vm, KVM_GET_DIRTY_LOG, &log) < 0)
        return -errno;
    for (size_t i = 0; i < words; i++)
        for (uint64_t word = bitmap[i]; word; word &= word - 1)
            *out++ = base + i * 64 + (uint64_t)__builtin_ctzll(word);
    *found = (size_t)(out - gfns);
    return now() - start;
}

/*
 * A VM with one memfd-backed slot and one vCPU that runs code at 0x1000 in real mode until its first port
 * access; then all of it is taken down.
 */
int64_t yardstick_lifecycle(int kvm, size_t size, const void *code, size_t code_size)
{
    int64_t start = now(), result = -EIO;
    int map_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    int file = memfd_create("yardstick", MFD_CLOEXEC);
    int vcpu = -1;
    char *memory = MAP_FAILED;
    struct kvm_run *run = MAP_FAILED;
    struct kvm_userspace_memory_region region = {.memory_size = size};
    struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
    struct kvm_sregs sregs;

    if (map_size < 0 || vm < 0 || file < 0 || ftruncate(file, (off_t)size))
        goto out;
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    if (memory == MAP_FAILED)
        goto out;
    memcpy(memory + 0x1000, code, code_size);
    region.userspace_addr = (uint64_t)memory;
    if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        goto out;
    vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    if (vcpu < 0)
        goto out;
    run = mmap(NULL, (size_t)map_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED || ioctl(vcpu, KVM_GET_SREGS, &sregs) < 0)
        goto out;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    if (ioctl(vcpu, KVM_SET_SREGS, &sregs) < 0 || ioctl(vcpu, KVM_SET_REGS, &regs) < 0)
        goto out;
    if (ioctl(vcpu, KVM_RUN, 0) < 0 || run->exit_reason != KVM_EXIT_IO)
        goto out;
    result = 0;
out:
    if (run != MAP_FAILED)
        munmap(run, (size_t)map_size);
    if (vcpu >= 0)
        close(vcpu);
    if (vm >= 0)
        close(vm);
    if (memory != MAP_FAILED)
        munmap(memory, size);
    if (file >= 0)
        close(file);
    return result ? result : now() - start;
}

/* Writes all of memory to a socket, then waits for the reader's one byte of acknowledgement. */
int64_t yardstick_send(int socket, const char *memory, size_t size)
{
    int64_t start = now();
    char acknowledgement;

    for (size_t at = 0; at < size;) {
        size_t part = size - at < BLOCK ? size - at : BLOCK;
        ssize_t sent = write(socket, memory + at, part);

        if (sent < 0 && errno != EINTR)
            return -errno;
        at += sent > 0 ? (size_t)sent : 0;
    }
    if (read(socket, &acknowledgement, 1) != 1)
        return -EPIPE;
    return now() - start;
}

/*
 * The other end: reads a whole memory and acknowledges it.  Through a buffer that stays in the cache, since
 * untouched guest memory costs more when the kernel faults it in than when memcpy does.
 */
int64_t yardstick_receive(int socket, char *memory, size_t size)
{
    static char block[BLOCK];
    int64_t start = now();

    for (size_t at = 0; at < size;) {
        size_t part = size - at < BLOCK ? size - at : BLOCK;

        for (size_t filled = 0; filled < part;) {
            ssize_t got = read(socket, block + filled, part - filled);

            if (got == 0)
                return -EPIPE;
            if (got < 0 && errno != EINTR)
                return -errno;
            filled += got > 0 ? (size_t)got : 0;
        }
        memcpy(memory + at, block, part);
        at += part;
    }
    if (write(socket, "", 1) != 1)
        return -EPIPE;
    return now() - start;
}

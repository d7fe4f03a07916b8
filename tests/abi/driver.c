/*
 * Runs every function of pykvm/abi/hot once, edge cases included, under the sanitizers; no KVM needed.
 * Expected values come from RFC 3720 B.4 (CRC-32C), api.rst (bitmap and ring layout), or are computed
 * bit by bit.  Each buffer is allocated exactly as large as it must be, so that one byte more is seen.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "../../pykvm/abi/hot/bitmap.c"
#include "../../pykvm/abi/hot/handle.c"
#include "../../pykvm/abi/hot/pages.c"
#include "../../pykvm/abi/hot/ring.c"

/* KVM_RUN as run.c calls it: first the answers that a test lined up, then those of the file. */
struct answer {
    int error;
    __u32 exit_reason;
};
static const struct answer *lined_up;
static size_t how_many;
static struct pykvm_run_page *answered_page;

static int answer_run(int fd, unsigned long request, unsigned long argument)
{
    if (!how_many)
        return ioctl(fd, request, argument);
    how_many--;
    answered_page->exit_reason = lined_up->exit_reason;
    errno = lined_up++->error;
    return errno ? -1 : 0;
}

#define ioctl(fd, request, argument) answer_run(fd, request, argument)
#include "../../pykvm/abi/hot/run.c"
#undef ioctl
#include "../../pykvm/abi/hot/signals.c"
#include "../../pykvm/abi/hot/userfault.c"

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            exit(1); \
        } \
    } while (0)

static __u64 random_state = 88172645463325252ULL;

static __u64 random64(void) /* xorshift64 */
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

static void test_bitmap(void)
{
    static const size_t sizes[] = {0, 1, 2, 63, 64, 65};

    for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
        size_t n = sizes[s], expected = 0, at = 0;
        __u64 *words = malloc(n * 8), *back = calloc(n ? n : 1, 8), base = random64() >> 12;

        for (size_t i = 0; i < n; i++) {
            words[i] = i % 4 == 0 ? ~0ULL : i % 4 == 1 ? 1ULL << 63 | 1 : i % 4 == 2 ? 0 : random64();
            for (int bit = 0; bit < 64; bit++)
                expected += words[i] >> bit & 1;
        }
        CHECK(pykvm_bitmap_count(words, n) == (long)expected);
        __u64 *gfns = malloc(expected * 8);
        CHECK(pykvm_bitmap_to_gfns(words, n, base, gfns) == (long)expected);
        for (size_t i = 0; i < n * 64; i++)
            if (words[i / 64] >> i % 64 & 1)
                CHECK(gfns[at++] == base + i);
        CHECK(at == expected);
        pykvm_gfns_to_bitmap(gfns, expected, base, back);
        CHECK(n == 0 || memcmp(words, back, n * 8) == 0);
        free(words);
        free(back);
        free(gfns);
    }
}

static void test_ring_wraps_around(void)
{
    enum { SIZE = 256 };
    struct kvm_dirty_gfn *ring = aligned_alloc(4096, SIZE * sizeof(*ring));
    __u32 *slots = malloc(SIZE * 4), head = 0xffffff80; /* the index itself wraps as well */
    __u64 *offsets = malloc(SIZE * 8), pushed = 0, taken = 0;

    memset(ring, 0, SIZE * sizeof(*ring));
    CHECK(pykvm_ring_find_dirty(ring, SIZE) == -1);
    for (int round = 0; round < 2000; round++) {
        __u32 fill = (__u32)(random64() % (SIZE + 1)), limit = (__u32)(random64() % (SIZE + 1)), got = 0;

        for (__u32 i = 0; i < fill; i++, pushed++) {
            struct kvm_dirty_gfn *entry = &ring[(head + i) % SIZE];

            entry->slot = (__u32)pushed % 7;
            entry->offset = pushed;
            entry->flags = KVM_DIRTY_GFN_F_DIRTY;
        }
        CHECK((pykvm_ring_find_dirty(ring, SIZE) >= 0) == (fill > 0));
        do {
            long n = pykvm_ring_harvest(ring, SIZE, head, limit, slots, offsets);

            CHECK(n >= 0 && n <= limit);
            for (long i = 0; i < n; i++, taken++)
                CHECK(offsets[i] == taken && slots[i] == taken % 7);
            head += (__u32)n;
            got += (__u32)n;
            limit = SIZE;
        } while (got < fill);
        CHECK(pykvm_ring_harvest(ring, SIZE, head, SIZE, slots, offsets) == 0);
        for (__u32 i = 0; i < SIZE; i++) {
            CHECK(ring[i].flags == 0 || ring[i].flags == KVM_DIRTY_GFN_F_RESET);
            ring[i].flags = 0;
        }
    }
    /* Neither a harvested entry (3) nor a clean one behind a gap is taken. */
    ring[head % SIZE].flags = KVM_DIRTY_GFN_F_DIRTY | KVM_DIRTY_GFN_F_RESET;
    ring[(head + 1) % SIZE].flags = KVM_DIRTY_GFN_F_DIRTY;
    CHECK(pykvm_ring_harvest(ring, SIZE, head, SIZE, slots, offsets) == 0);
    CHECK(pykvm_ring_find_dirty(ring, SIZE) == (long)((head + 1) % SIZE));
    free(ring);
    free(slots);
    free(offsets);
}

static void test_crc32c(void)
{
    static const char digits[] = "123456789";
    unsigned char zeros[32] = {0}, ones[32], up[32], down[32];
    /* RFC 3720 B.4: an iSCSI SCSI Read (10) command PDU. */
    static const unsigned char pdu[48] = {
        0x01, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x14, 0, 0, 0, 0, 0, 0x04, 0,
        0, 0, 0, 0x14, 0, 0, 0, 0x18, 0x28, 0, 0, 0, 0, 0, 0, 0, 0x02, 0, 0, 0, 0, 0, 0, 0};

    memset(ones, 0xff, sizeof(ones));
    for (int i = 0; i < 32; i++) {
        up[i] = (unsigned char)i;
        down[i] = (unsigned char)(31 - i);
    }
    const struct {
        const void *data;
        size_t n;
        __u32 crc;
    } vectors[] = {{zeros, 32, 0x8a9136aa}, {ones, 32, 0x62a8ab43}, {up, 32, 0x46dd794e},
                   {down, 32, 0x113fdb5c},  {pdu, 48, 0xd9963a56},  {digits, 9, 0xe3069283},
                   {digits, 0, 0}};
    for (size_t i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++) {
        CHECK(pykvm_crc32c(0, vectors[i].data, vectors[i].n) == vectors[i].crc);
        CHECK(~crc_portable(~0U, vectors[i].data, vectors[i].n) == vectors[i].crc);
#ifdef __x86_64__
        if (__builtin_cpu_supports("sse4.2"))
            CHECK(~crc_sse42(~0U, vectors[i].data, vectors[i].n) == vectors[i].crc);
#endif
    }
    /* In pieces, at every alignment and length. */
    for (size_t length = 0; length < 70; length++) {
        unsigned char *data = malloc(length);

        for (size_t i = 0; i < length; i++)
            data[i] = (unsigned char)random64();
        for (size_t cut = 0; cut <= length; cut++) {
            __u32 crc = pykvm_crc32c(pykvm_crc32c(0, data, cut), data + cut, length - cut);

            CHECK(crc == ~crc_portable(~0U, data, length));
        }
        free(data);
    }
}

static void test_zero(void)
{
    for (size_t length = 0; length < 40; length++) {
        unsigned char *data = calloc(length ? length : 1, 1);

        CHECK(pykvm_is_zero(data, length));
        for (size_t i = 0; i < length; i++) {
            data[i] = 0x80;
            CHECK(!pykvm_is_zero(data, length));
            data[i] = 0;
        }
        free(data);
    }
}

static void test_gather_and_scatter(void)
{
    enum { PAGES = 40 };
    char *memory = malloc(PAGES * PAGE), *copy = calloc(PAGES, PAGE), *out = malloc(PAGES * PAGE);
    __u64 *pages = malloc(PAGES * 8);
    __u8 *zero = malloc(PAGES);
    size_t stored = 99, filled = 0;

    for (int i = 0; i < PAGES; i++) {
        pages[i] = (__u64)(PAGES - 1 - i);
        memset(memory + i * PAGE, 0, PAGE);
        if (i % 3)
            memory[i * PAGE + (i % 2 ? PAGE - 1 : 0)] = (char)i;
        filled += i % 3 != 0;
    }
    __u32 crc = pykvm_gather(memory, pages, PAGES, out, zero, &stored);
    CHECK(stored == filled);
    CHECK(crc == pykvm_crc32c(0, out, stored * PAGE));
    size_t at = 0;
    for (int i = 0; i < PAGES; i++) {
        CHECK(zero[i] == (pages[i] % 3 == 0));
        if (!zero[i]) {
            CHECK(memcmp(out + at * PAGE, memory + pages[i] * PAGE, PAGE) == 0);
            pages[at++] = pages[i];
        }
    }
    pykvm_scatter(copy, pages, stored, out);
    CHECK(memcmp(copy, memory, PAGES * PAGE) == 0);
    CHECK(pykvm_gather(memory, pages, 0, out, zero, &stored) == 0 && stored == 0);
    pykvm_scatter(copy, pages, 0, out);
    free(memory);
    free(copy);
    free(out);
    free(pages);
    free(zero);
}

static void test_punch_hole(void)
{
    int fd = memfd_create("driver", 0), device = open("/dev/null", O_RDWR);
    char byte = 1;

    CHECK(ftruncate(fd, 4 * PAGE) == 0);
    CHECK(pwrite(fd, "x", 1, PAGE) == 1 && pwrite(fd, "y", 1, 2 * PAGE) == 1);
    CHECK(pykvm_punch_hole(fd, PAGE, PAGE) == 0);
    CHECK(pread(fd, &byte, 1, PAGE) == 1 && byte == 0);
    CHECK(pread(fd, &byte, 1, 2 * PAGE) == 1 && byte == 'y');
    CHECK(pykvm_punch_hole(fd, 0, 0) == -EINVAL);
    CHECK(pykvm_punch_hole(-1, 0, PAGE) == -EBADF);
    CHECK(pykvm_punch_hole(device, 0, PAGE) < 0);
    CHECK(pykvm_punch_hole(fd, 1ULL << 63, PAGE) < 0);
    close(fd);
    close(device);
}

/* --- handles: closed from one thread while others use them ------------------------------------------ */

struct crew {
    struct pykvm_handle handle;
    int answered, closed, busy, wrong;
};

static void *use_handle(void *argument)
{
    struct crew *crew = argument;

    for (;;) {
        int bytes = -1;
        long result = pykvm_ioctl(&crew->handle, 0x541B /* FIONREAD, of a pipe */, &bytes);

        if (result == 0 && bytes == 5)
            __atomic_add_fetch(&crew->answered, 1, __ATOMIC_RELAXED);
        else if (result == PYKVM_EBUSY)
            __atomic_add_fetch(&crew->busy, 1, __ATOMIC_RELAXED);
        else if (result == PYKVM_ECLOSED)
            break;
        else
            __atomic_add_fetch(&crew->wrong, 1, __ATOMIC_RELAXED);
    }
    __atomic_add_fetch(&crew->closed, 1, __ATOMIC_RELAXED);
    return NULL;
}

static void *close_handle(void *argument)
{
    struct crew *crew = argument;

    while (__atomic_load_n(&crew->answered, __ATOMIC_RELAXED) < 20)
        ;
    pykvm_handle_close(&crew->handle);
    return NULL;
}

static void *take_numbers(void *argument)
{
    /* Hands the number of a closed descriptor out again at once, to something with another answer. */
    int *stop = argument;

    while (!__atomic_load_n(stop, __ATOMIC_RELAXED)) {
        int fd = open("/dev/null", O_RDONLY);

        sched_yield();
        close(fd);
    }
    return NULL;
}

static void test_handles(void)
{
    for (int round = 0; round < 150; round++) {
        pthread_t users[3], closers[2], taker;
        struct crew crew = {0};
        int ends[2], stop = 0;

        CHECK(pipe(ends) == 0 && write(ends[1], "12345", 5) == 5);
        pykvm_handle_init(&crew.handle, ends[0], round % 2);
        pthread_create(&taker, NULL, take_numbers, &stop);
        for (int i = 0; i < 3; i++)
            pthread_create(&users[i], NULL, use_handle, &crew);
        for (int i = 0; i < 2; i++)
            pthread_create(&closers[i], NULL, close_handle, &crew);
        for (int i = 0; i < 3; i++)
            pthread_join(users[i], NULL);
        for (int i = 0; i < 2; i++)
            pthread_join(closers[i], NULL);
        __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
        pthread_join(taker, NULL);
        CHECK(crew.closed == 3 && crew.wrong == 0 && (round % 2 || crew.busy == 0));
        CHECK(crew.handle.fd == -1 && crew.handle.users == 0);
        close(ends[1]);
    }
    CHECK(pykvm_ioctl_int(&(struct pykvm_handle){.fd = -1}, 0x541B, 0) == -EBADF);
}

/* --- kicks and signals, without a KVM: KVM_RUN on a file that knows no ioctl ------------------------- */

static struct pykvm_vcpu vcpu;
static struct pykvm_run_page page;

static void *run_often(void *argument)
{
    (void)argument;
    for (int i = 0; i < 3000; i++) {
        long result = pykvm_vcpu_run(&vcpu, &page);

        CHECK(result == -ENOTTY || result == -EINVAL || result == PYKVM_EBUSY);
    }
    return NULL;
}

static void *kick_often(void *argument)
{
    (void)argument;
    for (int i = 0; i < 3000; i++)
        pykvm_vcpu_kick(&vcpu, &page);
    return NULL;
}

static volatile int handled;

static void count_signal(int number)
{
    (void)number;
    handled++;
}

static void count_signal_with_details(int number, siginfo_t *info, void *context)
{
    (void)context;
    handled += info->si_signo == number;
}

static void test_run_and_kick(void)
{
    pthread_t threads[4];

    pykvm_handle_init(&vcpu.handle, open("/dev/null", O_RDWR), 1);
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, i % 2 ? run_often : kick_often, NULL);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    CHECK(vcpu.kick == 1 && vcpu.tid == 0 && page.immediate_exit == 1);
    pykvm_handle_close(&vcpu.handle);
    CHECK(pykvm_vcpu_run(&vcpu, &page) == PYKVM_ECLOSED);
    CHECK(pykvm_vcpu_kick(&vcpu, &page) == 0);
}

/* api.rst section 5: KVM_EXIT_MEMORY_FAULT comes with EFAULT or EHWPOISON, and no other exit with an error. */
static void test_errors_of_kvm_run(void)
{
    static const struct {
        struct answer answer;
        long result;
    } cases[] = {
        {{0, KVM_EXIT_HLT}, KVM_EXIT_HLT},
        {{EFAULT, KVM_EXIT_MEMORY_FAULT}, KVM_EXIT_MEMORY_FAULT},
        {{EHWPOISON, KVM_EXIT_MEMORY_FAULT}, KVM_EXIT_MEMORY_FAULT},
        {{EFAULT, KVM_EXIT_UNKNOWN}, -EFAULT},
        {{EFAULT, KVM_EXIT_HLT}, -EFAULT},
        {{EINVAL, KVM_EXIT_MEMORY_FAULT}, -EINVAL},
        {{EINTR, KVM_EXIT_INTR}, PYKVM_RUN_INTERRUPTED},
        {{EAGAIN, KVM_EXIT_UNKNOWN}, PYKVM_RUN_INTERRUPTED}, /* a vCPU that waited for INIT got it */
    };
    static struct pykvm_vcpu fresh;

    pykvm_handle_init(&fresh.handle, open("/dev/null", O_RDWR), 1);
    answered_page = &page;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        lined_up = &cases[i].answer;
        how_many = 1;
        CHECK(pykvm_vcpu_run(&fresh, &page) == cases[i].result && how_many == 0);
    }
    pykvm_handle_close(&fresh.handle);
}

static void test_signals(void)
{
    struct sigaction action = {.sa_handler = count_signal};

    sigaction(SIGINT, &action, NULL);
    action.sa_flags = SA_SIGINFO;
    action.sa_sigaction = count_signal_with_details;
    sigaction(SIGALRM, &action, NULL);
    page.immediate_exit = 0;
    here_looked = 0;
    CHECK(pykvm_signals_watch(&page) == 1); /* found handlers whose signals it may have missed */
    pykvm_signals_unwatch();
    CHECK(pykvm_signals_watch(&page) == 0);
    raise(SIGINT);
    CHECK(handled == 1 && page.immediate_exit == 1);
    pykvm_signals_unwatch();
    page.immediate_exit = 0;
    raise(SIGALRM);
    CHECK(handled == 2 && page.immediate_exit == 0);
    CHECK(pykvm_signals_watch(&page) == 1); /* came before: do not enter */
    pykvm_signals_unwatch();
    here_looked = 0;
    CHECK(pykvm_signals_watch(&page) == 0); /* not chained to itself */
    pykvm_signals_unwatch();
    raise(SIGINT);
    CHECK(handled == 3);
    pykvm_signals_unwatch();
}

/* --- a signal before each instruction of pykvm_signals_watch ------------------------------------------ */

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) /* whose own steps take minutes */
extern const char __executable_start[], etext[]; /* the linker's: the program's own code, not the libraries' */
static int own_steps, comes_at;

/* int3 begins and ends single-stepping (SDM vol. 3, 18.3.1.4); before one of the steps a signal comes. */
static void step(int number, siginfo_t *info, void *context)
{
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;

    (void)number;
    if (info->si_code != TRAP_TRACE)
        registers[REG_EFL] ^= 0x100;
    else if (registers[REG_RIP] >= (greg_t)__executable_start && registers[REG_RIP] < (greg_t)etext &&
             own_steps++ == comes_at)
        note(SIGALRM, info, context);
}

static void test_no_moment_is_missed(void)
{
    struct sigaction action = {.sa_sigaction = step, .sa_flags = SA_SIGINFO};
    int came, arrived;

    sigaction(SIGTRAP, &action, NULL);
    for (comes_at = 0;; comes_at++) {
        pykvm_signals_unwatch();
        page.immediate_exit = 0;
        here_looked = own_steps = 0;
        __asm__ volatile("int3" ::: "memory");
        arrived = pykvm_signals_watch(&page);
        __asm__ volatile("int3" ::: "memory");
        came = own_steps > comes_at;
        CHECK(arrived == 0 || came);
        if (!came)
            break; /* the step beyond the last */
        CHECK(arrived == 1 || page.immediate_exit == 1);
    }
    CHECK(comes_at > 50); /* it did look */
    pykvm_signals_unwatch();
    signal(SIGTRAP, SIG_DFL);
}
#else
static void test_no_moment_is_missed(void)
{
}
#endif

/* --- a ring whose producer is another thread --------------------------------------------------------- */

enum { RING = 256, ENTRIES = 200000 };
static struct kvm_dirty_gfn shared_ring[RING];
static __u32 reset_index;

static void *produce(void *argument)
{
    (void)argument;
    for (__u32 i = 0; i < ENTRIES; i++) {
        struct kvm_dirty_gfn *entry = &shared_ring[i % RING];

        while (i - __atomic_load_n(&reset_index, __ATOMIC_ACQUIRE) >= RING - 64)
            sched_yield();
        entry->slot = i & 0xff;
        entry->offset = i;
        __atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_DIRTY, __ATOMIC_RELEASE);
    }
    return NULL;
}

static void test_ring_and_producer(void)
{
    __u32 slots[RING], head = 0;
    __u64 offsets[RING];
    pthread_t producer;

    pthread_create(&producer, NULL, produce, NULL);
    while (head < ENTRIES) {
        long n = pykvm_ring_harvest(shared_ring, RING, head, RING, slots, offsets);

        CHECK(n < RING);
        for (long i = 0; i < n; i++)
            CHECK(offsets[i] == head + (__u64)i && slots[i] == (offsets[i] & 0xff));
        head += (__u32)n;
        for (; reset_index != head; __atomic_store_n(&reset_index, reset_index + 1, __ATOMIC_RELEASE)) {
            CHECK(shared_ring[reset_index % RING].flags == KVM_DIRTY_GFN_F_RESET);
            __atomic_store_n(&shared_ring[reset_index % RING].flags, 0, __ATOMIC_RELEASE);
        }
        if (!n)
            sched_yield();
    }
    pthread_join(producer, NULL);
}

/* Two threads write to protected shared memory while its marks are taken and the pages protected anew. */
enum { FAULT_PAGES = 70, FAULT_ROUNDS = 40 };
static char *faulting;

static void *write_pages(void *argument)
{
    size_t first = (size_t)argument;

    for (int round = 0; round < FAULT_ROUNDS; round++)
        for (size_t page = first; page < FAULT_PAGES; page += 2)
            __atomic_fetch_add(&faulting[page * PAGE], 1, __ATOMIC_RELAXED);
    return NULL;
}

static void protect_pages(int fd, char *start, size_t pages)
{
    struct uffdio_writeprotect protect = { { (__u64)start, pages * PAGE }, UFFDIO_WRITEPROTECT_MODE_WP };

    CHECK(!ioctl(fd, UFFDIO_WRITEPROTECT, &protect));
}

static void test_faults(void)
{
    __u64 words[2] = { 0, 0 }, taken[2] = { 0, 0 };
    struct uffdio_api api = { UFFD_API, UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM, 0 };
    struct pykvm_fault_range range = { 0, FAULT_PAGES, words };
    int fd = pykvm_userfaultfd(O_CLOEXEC | O_NONBLOCK), error = 0, marked = 0;
    pthread_t writers[2];

    if (fd < 0 || ioctl(fd, UFFDIO_API, &api)) {
        CHECK(fd >= 0 || fd == -EPERM || fd == -ENOSYS); /* not for everybody, not before 5.19 */
        return;
    }
    faulting = mmap(NULL, FAULT_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct uffdio_register registration = { { (__u64)faulting, FAULT_PAGES * PAGE }, UFFDIO_REGISTER_MODE_WP, 0 };

    range.start = (__u64)faulting;
    CHECK(!ioctl(fd, UFFDIO_REGISTER, &registration));
    struct pykvm_faults *faults = pykvm_faults_start(fd, &range, 1, &error);

    CHECK(faults && !error);
    protect_pages(fd, faulting, FAULT_PAGES);
    faulting[3 * PAGE + 5] = faulting[69 * PAGE] = 1;
    pykvm_faults_take(faults, 0, taken);
    CHECK(taken[0] == 1 << 3 && taken[1] == 1 << 5 && pykvm_faults_count(faults) == 2);
    protect_pages(fd, faulting, FAULT_PAGES);
    for (size_t i = 0; i < 2; i++)
        pthread_create(&writers[i], NULL, write_pages, (void *)i);
    for (int round = 0; round < 20 || marked < FAULT_PAGES; round++) {
        pykvm_faults_take(faults, 0, taken);
        for (size_t page = 0; page < FAULT_PAGES; page++)
            if (taken[page / 64] >> page % 64 & 1) {
                marked++;
                protect_pages(fd, faulting + page * PAGE, 1);
            }
    }
    pthread_join(writers[0], NULL);
    pthread_join(writers[1], NULL);
    CHECK(!ioctl(fd, UFFDIO_UNREGISTER, &registration.range));
    pykvm_faults_stop(faults);
    close(fd);
    for (size_t page = 0; page < FAULT_PAGES; page++)
        CHECK(faulting[page * PAGE] == FAULT_ROUNDS + (page == 69));
    munmap(faulting, FAULT_PAGES * PAGE);
}

int main(void)
{
    test_bitmap();
    test_ring_wraps_around();
    test_crc32c();
    test_zero();
    test_gather_and_scatter();
    test_punch_hole();
    test_handles();
    test_run_and_kick();
    test_errors_of_kvm_run();
    test_signals();
    test_no_moment_is_missed();
    test_ring_and_producer();
    test_faults();
    puts("all fine");
    return 0;
}

/* Shared by the files of this folder and by the sanitizer test; the cdef twin is ../decl/hot.h. */
#ifndef PYKVM_HOT_H
#define PYKVM_HOT_H

#include "../compat.h"

#define PYKVM_ECLOSED (-100000)
#define PYKVM_EBUSY (-100001)

/* pykvm_vcpu_run's results beside exit reasons (0 to 0xfff) and -errno. */
#define PYKVM_RUN_KICKED 0x1000
#define PYKVM_RUN_INTERRUPTED 0x1001
#define PYKVM_RUN_PACKED_IO 0x2000

struct pykvm_handle {
    int fd;
    int users;
    int closed;
    int owner;
    int exclusive;
};

struct pykvm_vcpu {
    struct pykvm_handle handle;
    int tid;          /* the thread inside KVM_RUN, or 0 */
    int kick;         /* a kick that no run has reported yet */
    __u64 entries;    /* KVM_RUN calls made */
    __u64 swallowed;  /* port accesses answered here because nobody listens */
    __u64 ports[1024]; /* bit per I/O port: 1 = Python must see it */
};

void pykvm_handle_init(struct pykvm_handle *handle, int fd, int exclusive);
long pykvm_handle_enter(struct pykvm_handle *handle);
void pykvm_handle_leave(struct pykvm_handle *handle);
long pykvm_ioctl(struct pykvm_handle *handle, unsigned long request, void *arg);
long pykvm_ioctl_int(struct pykvm_handle *handle, unsigned long request, unsigned long arg);
int pykvm_handle_close(struct pykvm_handle *handle);

int pykvm_signals_watch(struct pykvm_run_page *run);
void pykvm_signals_unwatch(void);
int pykvm_kick_signal(void);
long pykvm_vcpu_run(struct pykvm_vcpu *vcpu, struct pykvm_run_page *run);
int pykvm_vcpu_kick(struct pykvm_vcpu *vcpu, struct pykvm_run_page *run);

long pykvm_ring_harvest(struct kvm_dirty_gfn *ring, __u32 size, __u32 head, __u32 limit, __u32 *slots,
                        __u64 *offsets);
long pykvm_ring_find_dirty(struct kvm_dirty_gfn *ring, __u32 size);

struct pykvm_dirty_log {
    __u32 slot;
    size_t words;
    __u64 base_gfn;
    __u64 *bitmap;
};

long pykvm_dirty_log(struct pykvm_handle *vm, const struct pykvm_dirty_log *log, __u64 *gfns, size_t room);
long pykvm_bitmap_count(const __u64 *words, size_t n);
long pykvm_bitmap_to_gfns(const __u64 *words, size_t n, __u64 base, __u64 *out);
void pykvm_gfns_to_bitmap(const __u64 *gfns, size_t n, __u64 base, __u64 *words);

__u32 pykvm_crc32c(__u32 crc, const void *data, size_t n);
int pykvm_is_zero(const void *data, size_t n);
__u32 pykvm_gather(const char *memory, const __u64 *pages, size_t n, char *out, __u8 *zero, size_t *stored);
void pykvm_scatter(char *memory, const __u64 *pages, size_t n, const char *in);
int pykvm_punch_hole(int fd, __u64 offset, __u64 length);

struct pykvm_fault_range {
    __u64 start;  /* host address */
    __u64 pages;
    __u64 *words; /* a bit per page that was written */
};
struct pykvm_faults;

int pykvm_userfaultfd(int flags);
struct pykvm_faults *pykvm_faults_start(int fd, const struct pykvm_fault_range *ranges, size_t n, int *error);
void pykvm_faults_take(struct pykvm_faults *faults, size_t i, __u64 *words);
__u64 pykvm_faults_count(struct pykvm_faults *faults);
void pykvm_faults_stop(struct pykvm_faults *faults);

#endif

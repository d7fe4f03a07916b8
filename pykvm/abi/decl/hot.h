/* pykvm/abi/hot: what is written in C because it must be fast or must be exact. */

/* handle.c */
struct pykvm_handle {
    int fd;
    int users;
    int closed;
    int owner;
    int exclusive;
};
#define PYKVM_ECLOSED ...
#define PYKVM_EBUSY ...
void pykvm_handle_init(struct pykvm_handle *handle, int fd, int exclusive);
long pykvm_ioctl(struct pykvm_handle *handle, unsigned long request, void *arg);
long pykvm_ioctl_int(struct pykvm_handle *handle, unsigned long request, unsigned long arg);
int pykvm_handle_close(struct pykvm_handle *handle);

/* run.c */
#define PYKVM_RUN_KICKED ...
#define PYKVM_RUN_INTERRUPTED ...
#define PYKVM_RUN_PACKED_IO ...
struct pykvm_vcpu {
    struct pykvm_handle handle;
    int tid;
    int kick;
    __u64 entries;
    __u64 swallowed;
    __u64 ports[1024];
};
int pykvm_kick_signal(void);
long pykvm_vcpu_run(struct pykvm_vcpu *vcpu, struct pykvm_run_page *run);
int pykvm_vcpu_kick(struct pykvm_vcpu *vcpu, struct pykvm_run_page *run);

/* ring.c */
long pykvm_ring_harvest(struct kvm_dirty_gfn *ring, __u32 size, __u32 head, __u32 limit,
                        __u32 *slots, __u64 *offsets);
long pykvm_ring_find_dirty(struct kvm_dirty_gfn *ring, __u32 size);

/* bitmap.c */
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

/* pages.c */
__u32 pykvm_crc32c(__u32 crc, const void *data, size_t n);
int pykvm_is_zero(const void *data, size_t n);
__u32 pykvm_gather(const char *memory, const __u64 *pages, size_t n, char *out, __u8 *zero,
                   size_t *stored);
void pykvm_scatter(char *memory, const __u64 *pages, size_t n, const char *in);
int pykvm_punch_hole(int fd, __u64 offset, __u64 length);

/* userfault.c */
struct pykvm_fault_range {
    __u64 start;
    __u64 pages;
    __u64 *words;
};
struct pykvm_faults;
int pykvm_userfaultfd(int flags);
struct pykvm_faults *pykvm_faults_start(int fd, const struct pykvm_fault_range *ranges, size_t n, int *error);
void pykvm_faults_take(struct pykvm_faults *faults, size_t i, __u64 *words);
__u64 pykvm_faults_count(struct pykvm_faults *faults);
void pykvm_faults_stop(struct pykvm_faults *faults);

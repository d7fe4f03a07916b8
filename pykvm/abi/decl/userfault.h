/* Tracking writes of all of the host: ioctl_userfaultfd(2), PAGEMAP_SCAN(2const), admin-guide/mm/pagemap.rst. */
#define UFFD_API ...
#define UFFD_USER_MODE_ONLY ...
#define UFFDIO_API ...
#define UFFDIO_REGISTER ...
#define UFFDIO_UNREGISTER ...
#define UFFDIO_WRITEPROTECT ...
#define UFFDIO_REGISTER_MODE_WP ...
#define UFFDIO_WRITEPROTECT_MODE_WP ...
#define UFFD_FEATURE_PAGEFAULT_FLAG_WP ...
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM ...
#define UFFD_FEATURE_WP_UNPOPULATED ...
#define UFFD_FEATURE_WP_ASYNC ...
#define PAGEMAP_SCAN ...
#define PAGE_IS_WRITTEN ...
#define PM_SCAN_WP_MATCHING ...
#define PM_SCAN_CHECK_WPASYNC ...

struct uffdio_range {
    __u64 start;
    __u64 len;
};

struct uffdio_api {
    __u64 api;
    __u64 features;
    __u64 ioctls;
};

struct uffdio_register {
    struct uffdio_range range;
    __u64 mode;
    __u64 ioctls;
};

struct uffdio_writeprotect {
    struct uffdio_range range;
    __u64 mode;
};

struct page_region {
    __u64 start;
    __u64 end;
    __u64 categories;
};

struct pm_scan_arg {
    __u64 size;
    __u64 flags;
    __u64 start;
    __u64 end;
    __u64 walk_end;
    __u64 vec;
    __u64 vec_len;
    __u64 max_pages;
    __u64 category_inverted;
    __u64 category_mask;
    __u64 category_anyof_mask;
    __u64 return_mask;
};

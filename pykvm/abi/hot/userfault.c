/*
 * userfaultfd write-protection (ioctl_userfaultfd(2)): opening one, and the thread that answers its faults.
 *
 * Whoever writes to a protected page sleeps in its fault until the thread has noted the page and lifted the
 * protection.  The writer may be a vCPU in KVM_RUN or a Python thread that holds the GIL in the middle of a
 * store, so the thread is C's own and needs nothing of Python.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "hot.h"

#define FAULT_PAGE 4096
#define FAULT_EVENTS 16

/* One descriptor, or -errno.  Where the system call is not permitted /dev/userfaultfd may be (6.1). */
int pykvm_userfaultfd(int flags)
{
    int fd = (int)syscall(SYS_userfaultfd, flags);

    if (fd >= 0)
        return fd;
    int error = errno;
    int device = error == EPERM ? open("/dev/userfaultfd", O_RDWR | O_CLOEXEC) : -1;

    if (device >= 0) {
        fd = ioctl(device, USERFAULTFD_IOC_NEW, (unsigned long)flags);
        close(device);
    }
    return fd >= 0 ? fd : -error;
}

struct pykvm_faults {
    int fd;
    int wake;
    size_t n;
    const struct pykvm_fault_range *ranges;
    __u64 count;
    pthread_t thread;
    pthread_mutex_t lock;
};

/* Notes the page, then lets its writers go on.  Under the lock, so that a page which was taken is one whose
 * protection was lifted already: protecting it anew cannot be undone by a fault from before. */
static void note_fault(struct pykvm_faults *faults, __u64 address)
{
    struct uffdio_writeprotect lift = { .range = { address & ~(__u64)(FAULT_PAGE - 1), FAULT_PAGE } };

    pthread_mutex_lock(&faults->lock);
    faults->count++;
    for (size_t i = 0; i < faults->n; i++) {
        const struct pykvm_fault_range *range = &faults->ranges[i];
        __u64 page = (address - range->start) / FAULT_PAGE;

        if (address >= range->start && page < range->pages)
            range->words[page / 64] |= 1ULL << page % 64;
    }
    while (ioctl(faults->fd, UFFDIO_WRITEPROTECT, &lift)) {
        if (errno == EAGAIN) /* the mappings are changing */
            continue;
        ioctl(faults->fd, UFFDIO_WAKE, &lift.range); /* no longer registered */
        break;
    }
    pthread_mutex_unlock(&faults->lock);
}

static void *answer_faults(void *argument)
{
    struct pykvm_faults *faults = argument;
    struct pollfd wait[2] = { { .fd = faults->fd, .events = POLLIN }, { .fd = faults->wake, .events = POLLIN } };
    struct uffd_msg events[FAULT_EVENTS];

    for (;;) {
        poll(wait, 2, -1);
        ssize_t size = read(faults->fd, events, sizeof(events));

        for (ssize_t i = 0; i < size / (ssize_t)sizeof(events[0]); i++)
            if (events[i].event == UFFD_EVENT_PAGEFAULT)
                note_fault(faults, events[i].arg.pagefault.address);
        if (size <= 0 && wait[1].revents)
            return NULL;
    }
}

/* Starts the thread for fd (non-blocking); NULL with *error an errno.  The ranges stay until the stop. */
struct pykvm_faults *pykvm_faults_start(int fd, const struct pykvm_fault_range *ranges, size_t n, int *error)
{
    struct pykvm_faults *faults = calloc(1, sizeof(*faults));
    sigset_t all, before;

    if (!faults) {
        *error = ENOMEM;
        return NULL;
    }
    faults->fd = fd;
    faults->ranges = ranges;
    faults->n = n;
    faults->wake = eventfd(0, EFD_CLOEXEC);
    pthread_mutex_init(&faults->lock, NULL);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for Python's threads */
    *error = faults->wake < 0 ? errno : pthread_create(&faults->thread, NULL, answer_faults, faults);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!*error)
        return faults;
    if (faults->wake >= 0)
        close(faults->wake);
    free(faults);
    return NULL;
}

/* Moves range i's marks to words and clears them. */
void pykvm_faults_take(struct pykvm_faults *faults, size_t i, __u64 *words)
{
    const struct pykvm_fault_range *range = &faults->ranges[i];
    size_t n = (range->pages + 63) / 64;

    pthread_mutex_lock(&faults->lock);
    memcpy(words, range->words, n * sizeof(*words));
    memset(range->words, 0, n * sizeof(*words));
    pthread_mutex_unlock(&faults->lock);
}

/* Faults that were answered so far. */
__u64 pykvm_faults_count(struct pykvm_faults *faults)
{
    pthread_mutex_lock(&faults->lock);
    __u64 count = faults->count;
    pthread_mutex_unlock(&faults->lock);
    return count;
}

/* Ends the thread once no fault waits for it, and frees everything but the ranges. */
void pykvm_faults_stop(struct pykvm_faults *faults)
{
    __u64 one = 1;

    while (write(faults->wake, &one, sizeof(one)) < 0 && errno == EINTR)
        continue;
    pthread_join(faults->thread, NULL);
    pthread_mutex_destroy(&faults->lock);
    close(faults->wake);
    free(faults);
}

/*
 * A file descriptor that can be closed from any thread while others use it.
 *
 * users counts the calls that are inside the kernel; the descriptor is closed by whoever finds it unused
 * and marked closed, so its number is never reused under a call in flight.  An exclusive handle (a vCPU)
 * admits one thread at a time: KVM serialises vCPU ioctls on a mutex, and a second caller would otherwise
 * hang until the guest exits.
 */
#include <errno.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "hot.h"

void pykvm_handle_init(struct pykvm_handle *handle, int fd, int exclusive)
{
    handle->users = 0;
    handle->closed = 0;
    handle->owner = 0;
    handle->exclusive = exclusive;
    __atomic_store_n(&handle->fd, fd, __ATOMIC_RELEASE);
}

static void close_if_last(struct pykvm_handle *handle)
{
    if (__atomic_load_n(&handle->closed, __ATOMIC_SEQ_CST) &&
        __atomic_load_n(&handle->users, __ATOMIC_SEQ_CST) == 0) {
        int fd = __atomic_exchange_n(&handle->fd, -1, __ATOMIC_SEQ_CST);
        if (fd >= 0)
            close(fd);
    }
}

long pykvm_handle_enter(struct pykvm_handle *handle)
{
    int nobody = 0;

    __atomic_add_fetch(&handle->users, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&handle->closed, __ATOMIC_SEQ_CST)) {
        __atomic_sub_fetch(&handle->users, 1, __ATOMIC_SEQ_CST);
        close_if_last(handle);
        return PYKVM_ECLOSED;
    }
    if (handle->exclusive &&
        !__atomic_compare_exchange_n(&handle->owner, &nobody, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
        __atomic_sub_fetch(&handle->users, 1, __ATOMIC_SEQ_CST);
        close_if_last(handle);
        return PYKVM_EBUSY;
    }
    return 0;
}

void pykvm_handle_leave(struct pykvm_handle *handle)
{
    if (handle->exclusive)
        __atomic_store_n(&handle->owner, 0, __ATOMIC_RELEASE);
    __atomic_sub_fetch(&handle->users, 1, __ATOMIC_SEQ_CST);
    close_if_last(handle);
}

/* Returns the ioctl's result, -errno, or one of the two PYKVM_E codes. */
long pykvm_ioctl(struct pykvm_handle *handle, unsigned long request, void *arg)
{
    long result = pykvm_handle_enter(handle);

    if (result)
        return result;
    result = ioctl(handle->fd, request, arg);
    if (result < 0)
        result = -errno;
    pykvm_handle_leave(handle);
    return result;
}

long pykvm_ioctl_int(struct pykvm_handle *handle, unsigned long request, unsigned long arg)
{
    return pykvm_ioctl(handle, request, (void *)arg);
}

/* Marks the handle closed.  Returns the number of calls still inside; the last of them closes the fd. */
int pykvm_handle_close(struct pykvm_handle *handle)
{
    __atomic_store_n(&handle->closed, 1, __ATOMIC_SEQ_CST);
    close_if_last(handle);
    return __atomic_load_n(&handle->users, __ATOMIC_SEQ_CST);
}

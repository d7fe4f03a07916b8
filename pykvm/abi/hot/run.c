/*
 * KVM_RUN until an exit that Python must see, and the kick that ends it from another thread.
 *
 * A kick is a flag (kick), KVM's immediate_exit and a signal, set in this order.  The runner takes them
 * back in the opposite order on EINTR: clear immediate_exit, then take the flag.  So a kick that arrives
 * at any moment is reported by exactly one run, and a signal or an immediate_exit that is left over from
 * a kick already reported only costs one silent turn of the loop (api.rst section 5, immediate_exit).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "hot.h"

static void ignore_signal(int number)
{
    (void)number;
}

/* The last real-time signal but three: glibc uses the first two, debuggers and libraries the next ones. */
int pykvm_kick_signal(void)
{
    static int installed;
    int number = SIGRTMAX - 3;

    if (!__atomic_load_n(&installed, __ATOMIC_ACQUIRE)) {
        struct sigaction action;

        memset(&action, 0, sizeof(action));
        action.sa_handler = ignore_signal; /* without SA_RESTART: KVM_RUN must end */
        sigemptyset(&action.sa_mask);
        if (sigaction(number, &action, NULL))
            return -errno;
        __atomic_store_n(&installed, 1, __ATOMIC_RELEASE);
    }
    return number;
}

static void unblock_kick_signal(void)
{
    static __thread int done;

    if (!done) {
        sigset_t set;

        sigemptyset(&set);
        sigaddset(&set, pykvm_kick_signal());
        pthread_sigmask(SIG_UNBLOCK, &set, NULL);
        done = 1;
    }
}

/* gettid, asked once a thread: a system call for each exit would be a good part of the exit's cost. */
static __thread int own_thread_id;

static void forget_thread_id(void)
{
    own_thread_id = 0;
}

/* The thread that forks is another one in the child. */
__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, forget_thread_id);
}

static int thread_id(void)
{
    if (!own_thread_id)
        own_thread_id = (int)syscall(SYS_gettid);
    return own_thread_id;
}

static int listened(const struct pykvm_vcpu *vcpu, unsigned int port, unsigned int size)
{
    for (unsigned int p = port; p < port + size && p < 0x10000; p++)
        if (vcpu->ports[p / 64] >> (p % 64) & 1)
            return 1;
    return 0;
}

static long run_until_exit(struct pykvm_vcpu *vcpu, struct pykvm_run_page *run)
{
    long result;

    for (;;) {
        struct pykvm_run_io *io = &run->u.io;

        vcpu->entries++;
        if (ioctl(vcpu->handle.fd, KVM_RUN, 0) < 0) {
            if (errno == EAGAIN) {
                result = PYKVM_RUN_INTERRUPTED; /* waiting for its INIT, it took one: the next call goes on */
                break;
            }
            if ((errno == EFAULT || errno == EHWPOISON) && run->exit_reason == KVM_EXIT_MEMORY_FAULT) {
                result = KVM_EXIT_MEMORY_FAULT; /* the one exit that comes with an error (api.rst section 5) */
                break;
            }
            if (errno != EINTR) {
                result = -errno;
                break;
            }
            __atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
            if (__atomic_exchange_n(&vcpu->kick, 0, __ATOMIC_SEQ_CST))
                result = PYKVM_RUN_KICKED;
            else
                result = PYKVM_RUN_INTERRUPTED; /* Python may have a signal to handle; it calls again */
            break;
        }
        result = run->exit_reason;
        if (result != KVM_EXIT_IO)
            break;
        if (!listened(vcpu, io->port, io->size)) {
            if (io->direction == KVM_EXIT_IO_IN)
                memset((char *)run + io->data_offset, 0xff, (size_t)io->size * io->count);
            vcpu->swallowed++;
            continue;
        }
        if (io->count == 1 && io->size <= 4) {
            /* The common exit in one word: tag 13, direction 14, size 16:18, port 20:35, data 36:62. */
            __u32 data = 0;

            if (io->direction == KVM_EXIT_IO_OUT)
                memcpy(&data, (char *)run + io->data_offset, io->size);
            if (data <= 0x7ffffff) /* else Python reads the page */
                result = PYKVM_RUN_PACKED_IO | (long)io->direction << 14 | (long)io->size << 16 |
                         (long)io->port << 20 | (long)data << 36;
        }
        break;
    }
    return result;
}

long pykvm_vcpu_run(struct pykvm_vcpu *vcpu, struct pykvm_run_page *run)
{
    long result = pykvm_handle_enter(&vcpu->handle);

    if (result)
        return result;
    unblock_kick_signal();
    __atomic_store_n(&vcpu->tid, thread_id(), __ATOMIC_SEQ_CST);
    result = pykvm_signals_watch(run) ? PYKVM_RUN_INTERRUPTED : run_until_exit(vcpu, run);
    pykvm_signals_unwatch();
    __atomic_store_n(&vcpu->tid, 0, __ATOMIC_SEQ_CST);
    pykvm_handle_leave(&vcpu->handle);
    return result;
}

/* Returns 1 when a thread was inside KVM_RUN and was signalled, 0 when the next run will end at once. */
int pykvm_vcpu_kick(struct pykvm_vcpu *vcpu, struct pykvm_run_page *run)
{
    int tid;

    __atomic_store_n(&vcpu->kick, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    tid = __atomic_load_n(&vcpu->tid, __ATOMIC_SEQ_CST);
    if (tid == 0)
        return 0;
    /* A thread that left meanwhile gets a signal whose handler does nothing. */
    syscall(SYS_tgkill, getpid(), tid, pykvm_kick_signal());
    return 1;
}

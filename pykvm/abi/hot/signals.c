/*
 * Signals that Python handles must end KVM_RUN, at whatever moment they come.
 *
 * Python's own handler only takes a note, which the interpreter looks at between two instructions.  A
 * signal between its last look and KVM_RUN would wait until the guest exits, perhaps for ever.  So a
 * handler of ours goes before Python's in the main thread, the only one that runs Python handlers: it
 * makes KVM_RUN return at once (immediate_exit, api.rst section 5), or run.c not enter at all.
 *
 * Dispositions change at run time, and asking for one costs as much as a cheap ioctl.  They are looked at
 * again when some time has passed, so only a signal that comes in the window above and within a fraction of
 * a millisecond after its handler was installed anew is handled late.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "hot.h"

#define LOOK_AGAIN (1ULL << 20) /* time-stamp counter ticks: well below a millisecond */

/* initial-exec: the handler must not allocate, and the first touch of other thread-local storage does. */
#define HERE static __thread __attribute__((tls_model("initial-exec")))
HERE struct pykvm_run_page *volatile here_run; /* the vCPU that this thread is about to run, or runs */
HERE volatile sig_atomic_t here_arrived;       /* a signal came since the last return to Python */
HERE unsigned long long here_looked;

static struct sigaction chained[NSIG];

static void note(int number, siginfo_t *info, void *context)
{
    struct pykvm_run_page *run = here_run;

    here_arrived = 1;
    if (run)
        __atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    if (chained[number].sa_flags & SA_SIGINFO)
        chained[number].sa_sigaction(number, info, context);
    else
        chained[number].sa_handler(number);
}

static int go_before(int number)
{
    struct sigaction action;

    if (sigaction(number, NULL, &action) || action.sa_handler == SIG_DFL || action.sa_handler == SIG_IGN ||
        action.sa_flags & SA_RESETHAND || ((action.sa_flags & SA_SIGINFO) && action.sa_sigaction == note))
        return 0;
    /* Python installs the same one again and again.  Another one may call ours in turn: leave it alone. */
    if (chained[number].sa_handler && chained[number].sa_handler != action.sa_handler)
        return 0;
    chained[number] = action;
    action.sa_flags |= SA_SIGINFO;
    action.sa_sigaction = note;
    return sigaction(number, &action, NULL) == 0;
}

/* Whether a handler was found that ours does not go before yet: its signal may have come unnoticed. */
static int look(void)
{
    int found = 0;

    static const int numbers[] = {SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGTERM};

    if (getpid() != (pid_t)syscall(SYS_gettid))
        return 0;
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
        found |= go_before(numbers[i]);
    return found;
}

/* From here on a signal ends KVM_RUN on ``run``.  Returns 1 if one came before: do not enter. */
int pykvm_signals_watch(struct pykvm_run_page *run)
{
    unsigned long long now = __builtin_ia32_rdtsc();

    if (now - here_looked >= LOOK_AGAIN) {
        here_looked = now;
        /* Not |=: a signal between its load and its store would be forgotten. */
        if (look())
            here_arrived = 1;
    }
    here_run = run;
    return here_arrived;
}

void pykvm_signals_unwatch(void)
{
    here_run = NULL;
    here_arrived = 0; /* the interpreter looks for signals as soon as it has the result */
}

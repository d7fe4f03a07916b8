"""Real KVM hosts of several kinds, booted under an emulator, with a command of ours inside.

A KVM tool tried on one KVM proves little.  Here a Debian kernel with its own ``kvm_amd`` or ``kvm_intel``
runs under QEMU's TCG or Bochs, which emulate SVM and VMX in software, so that an ordinary machine has a
dozen real KVM hosts. ``docs/labs.md`` tells how to use them.

    kinds         what kinds of KVM there are
    cache         the folder that holds everything; locks, bounds
    archive       Debian's archive through apt, apart from the system's packages
    kernels       kernels: offered, prepared
    toolbox       QEMU and busybox, unpacked
    bochs_build   Bochs, built once
    environment   the files of the Python environment that runs now
    layers        cpio archives of kernel modules, Python, the project, one command
    emulator      what an emulator is; qemu, bochs are two
    channel       the wire between guest and host
    agent         the program in the guest
    session       one boot: from a command to its exit status
    diagnosis     why a lab died
    selections    which tests run there, and within what time
    suite         the tests in a lab: records become results, a dead lab costs one test; results, junit
    matrix        kernels times kinds; cell and matrix_run run them, matrix_report and matrix_facts tell
"""

"""What the guest starts with: /init and the few files around it.

/init is a script for busybox.  It takes everything that differs between boots from /lab/boot, a file of shell
assignments in the run's own layer, so that the base layer can be kept.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

BOOT = "/lab/boot"

INIT = r"""#!/bin/sh
export PATH=/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
ln -sf /proc/self/fd /dev/fd
ifconfig lo up
hostname lab
. /lab/boot
for entry in $MODULES; do
    name=${entry%%:*}
    parameters=$(echo "${entry#*:}" | tr , ' ')
    insmod /lab/modules/$name.ko $parameters || echo "pykvm: insmod $name failed"
done
rm -rf /lab/modules
eval "$AGENT"
echo "pykvm: the agent ended with $?"
sync
poweroff -f
"""

BASE_FOLDERS: Sequence[str] = (
    "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64",
    "/dev", "/proc", "/sys", "/run", "/tmp", "/root", "/etc", "/lab",
)  # fmt: skip
BASE_LINKS: Mapping[str, str] = {
    "/bin": "usr/bin",
    "/sbin": "usr/sbin",
    "/lib": "usr/lib",
    "/lib64": "usr/lib64",
}
BASE_FILES: Mapping[str, tuple[str, int]] = {
    "/init": (INIT, 0o755),
    "/etc/passwd": ("root:x:0:0:root:/root:/bin/sh\n", 0o644),
    "/etc/group": ("root:x:0:\nkvm:x:104:\n", 0o644),
    "/etc/hosts": ("127.0.0.1 localhost lab\n::1 localhost\n", 0o644),
}


def boot_file(modules: Sequence[str], parameters: Mapping[str, str], agent: Sequence[str]) -> str:
    """The text of /lab/boot: modules in load order with parameters (``a=1,b=2``), the agent's command."""
    entries = [f"{name}:{parameters.get(name, '')}" for name in modules]
    values = {"MODULES": " ".join(entries), "AGENT": shlex.join(agent)}
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())

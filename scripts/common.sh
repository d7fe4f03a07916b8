# Sourced by the scripts here: everything between a fresh checkout and a working .venv.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
STAMP=$VENV/pykvm-stamp
MISSING_PACKAGES_STATUS=2

say() { printf '== %s\n' "$*" >&2; }
fail() {
    local status=$1
    shift
    printf 'error: %s\n' "$*" >&2
    exit "$status"
}

# What the installed package depends on.  The path of the checkout counts too, since a venv cannot be moved.
fingerprint() {
    (
        cd "$ROOT" || exit 1
        printf '%s\n' "$ROOT"
        "$VENV/bin/python" -V
        find pyproject.toml setup.py scripts/build_guests.py guests pykvm/abi/build.py pykvm/abi/compat.h \
            pykvm/abi/decl pykvm/abi/hot -type f -not -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    ) 2>&1 | sha256sum
}

# True if the installation is whole and belongs to the present sources.
up_to_date() {
    [[ -x $VENV/bin/python && -f $STAMP && $(<"$STAMP") == "$(fingerprint)" ]] || return 1
    compgen -G "$ROOT/pykvm/abi/_native*.so" >/dev/null && compgen -G "$ROOT/pykvm/guest/images/*" >/dev/null
}

# Whether an interpreter can carry the project: version, C headers, venv with pip.
PYTHON_CHECK='
import sys
if sys.version_info < (3, 11):
    sys.exit("version")
try:
    import ensurepip, venv
except ImportError:
    sys.exit("venv")
import os, sysconfig
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit("headers")
'

# Prints the first interpreter that can; $PYTHON goes first, the newest is not preferred over the default.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 /usr/bin/python3 python3.13 python3.12 python3.11 python3.14; do
        if candidate=$(command -v "$candidate") && "$candidate" -c "$PYTHON_CHECK" 2>/dev/null; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    return 1
}

# The Debian packages that a usable interpreter needs here.
python_packages() {
    local name=python3
    # A distribution whose default is too old may have a newer one beside it (Ubuntu 22.04: python3.11).
    if [[ -x /usr/bin/python3 ]] && ! /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        name=python3.11
    fi
    printf '%s\n' "$name" "$name-dev" "$name-venv"
}

missing_packages() {
    find_python >/dev/null || python_packages
    if ! command -v cc >/dev/null; then
        printf '%s\n' gcc libc6-dev linux-libc-dev
    elif ! printf '#include <stdio.h>\n#include <linux/kvm.h>\n' | cc -E - >/dev/null 2>&1; then
        printf '%s\n' libc6-dev linux-libc-dev
    fi
    local tool
    for tool in as ld objcopy objdump nm; do
        if ! command -v "$tool" >/dev/null; then
            printf '%s\n' binutils
            break
        fi
    done
}

install_system_packages() {
    local -a packages
    mapfile -t packages < <(missing_packages)
    ((${#packages[@]})) || return 0
    if ! command -v apt-get >/dev/null; then
        fail "$MISSING_PACKAGES_STATUS" "this machine lacks the equivalents of these Debian packages: ${packages[*]}"
    fi
    if ((EUID != 0)); then
        printf 'error: system packages are missing; install them and start again:\n\n' >&2
        printf '    sudo apt-get update && sudo apt-get install -y %s\n\n' "${packages[*]}" >&2
        exit "$MISSING_PACKAGES_STATUS"
    fi
    say "installing system packages: ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # Old package lists may still do, so a failing update is no reason to give up.
    apt-get update -q >&2 || true
    if ! apt-get install -q -y --no-install-recommends -o DPkg::Lock::Timeout=120 "${packages[@]}" >&2; then
        fail "$MISSING_PACKAGES_STATUS" "apt-get could not install: ${packages[*]}"
    fi
    mapfile -t packages < <(missing_packages)
    ((${#packages[@]} == 0)) ||
        fail "$MISSING_PACKAGES_STATUS" "still missing after apt-get install: ${packages[*]} (Python 3.11 or newer is needed)"
}

# Makes .venv with pykvm installed from this checkout (editable: the sources are used in place).
prepare() {
    # One set-up at a time; the lock goes with the descriptor, so that no program started later keeps it.
    exec {lock}<"$ROOT"
    flock "$lock"
    if ! up_to_date; then
        install_system_packages
        local python
        python=$(find_python)
        if [[ ! -x $VENV/bin/python || $("$VENV/bin/python" -V) != "$("$python" -V)" || ! -x $VENV/bin/pip ]]; then
            say "making .venv with $("$python" -V) ($python)"
            "$python" -m venv --clear "$VENV"
        fi
        rm -f "$STAMP"
        say "installing pykvm into .venv: compiling the binding, assembling the guests"
        "$VENV/bin/pip" install --quiet --disable-pip-version-check --editable "${ROOT}[test]" >&2 ||
            fail 1 "pip could not install pykvm; its message is above"
        # An editable install only warns when a build step fails, so the guests are built by name.
        "$VENV/bin/python" "$ROOT/scripts/build_guests.py" >&2
        "$VENV/bin/python" -c 'import pykvm.abi' || fail 1 "the compiled binding cannot be loaded"
        fingerprint >"$STAMP"
    fi
    exec {lock}<&-
}

# True if /dev/kvm can create a VM.  Says why not on standard error.
kvm_usable() {
    "$VENV/bin/python" - <<'PYTHON'
import fcntl, os, sys

KVM_CREATE_VM = 0xAE01
try:
    device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    os.close(fcntl.ioctl(device, KVM_CREATE_VM, 0))
except OSError as error:
    sys.exit(f"/dev/kvm: {error.strerror}")
PYTHON
}

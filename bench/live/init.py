"""Process 1 of a lab host: sets up its own view of files and network, reaps, and ends with whoever started it.

Standard library only; run as `python -I -S init.py HOSTNAME TMP_FOLDER [FOLDER_TO_KEEP ...]` in new namespaces. Prints
one line when the host is ready, or what went wrong. When standard input closes (its starter is gone, however it died),
it ends, and the kernel ends every process of the host with it.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from contextlib import suppress


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True, text=True)


def set_up(hostname: str, tmp: str, keep: list[str]) -> None:
    """A hostname, loopback, and folders of its own: /tmp, /dev/shm and /sys (for its own links)."""
    socket.sethostname(hostname)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, capture_output=True, text=True)
    shown = [folder for folder in keep if folder == "/tmp" or folder.startswith("/tmp/")]
    inner = os.path.join(tmp, "tmp")
    held = os.path.join(tmp, "held")
    os.makedirs(inner, exist_ok=True)
    os.chmod(inner, 0o1777)  # noqa: S103 - as /tmp is everywhere
    for i, folder in enumerate(shown):  # they would vanish under the private /tmp
        os.makedirs(os.path.join(held, str(i)), exist_ok=True)
        _mount("--bind", folder, os.path.join(held, str(i)))
    cgroups = os.path.join(tmp, "cgroup")
    os.makedirs(cgroups, exist_ok=True)
    _mount("--rbind", "/sys/fs/cgroup", cgroups)
    _mount("-t", "sysfs", "sysfs", "/sys")
    _mount("--rbind", cgroups, "/sys/fs/cgroup")
    _mount("-t", "tmpfs", "-o", "size=2g,mode=1777", "tmpfs", "/dev/shm")
    sources = [os.path.join(held, str(i)) for i in range(len(shown))]
    for folder in shown:
        os.makedirs(inner + folder[len("/tmp") :], exist_ok=True)
    descriptors = [os.open(source, os.O_PATH) for source in sources]  # the way to them is about to be hidden
    _mount("--bind", inner, "/tmp")
    for folder, descriptor in zip(shown, descriptors, strict=True):
        subprocess.run(
            ["mount", "--bind", f"/proc/self/fd/{descriptor}", folder],
            check=True,
            capture_output=True,
            text=True,
            pass_fds=[descriptor],
        )
        os.close(descriptor)


def reap_until_closed() -> None:
    """Collect the dead, as process 1 must, until standard input closes."""
    while True:
        ready, _, _ = select.select([0], [], [], 0.2)
        if ready and not os.read(0, 4096):
            return
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def main() -> None:
    """Set up, say so, wait."""
    try:
        set_up(sys.argv[1], sys.argv[2], sys.argv[3:])
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (getattr(error, "stderr", "") or str(error)).strip().replace("\n", " ")
        print(f"error: {detail}", flush=True)
        sys.exit(1)
    print("ready", flush=True)
    reap_until_closed()


if __name__ == "__main__":
    main()

"""Hosts of a lab as `ray up` wants them: reached over ssh, each with a home of its own, all dependencies installed.

What a machine would have after an earlier `ray up`: a virtual environment that holds Ray, torch and the rest (here it
looks into this test's own), and a package registry within reach (here a folder that holds the build backend).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pwd
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

from bench.live.hosts import Host, Lab, missing

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin:/sbin")
HOME = pwd.getpwuid(0).pw_dir
VENV = f"{HOME}/.shadecast-venv"

# Inside a host: a home of its own, in which the interpreter's folders stay visible; then ssh as everywhere.
_SET_UP = f"""
set -e
for folder in {{kept}}; do
  mkdir -p "/tmp/home/${{{{folder#{HOME}/}}}}"
  mount --bind "$folder" "/tmp/home/${{{{folder#{HOME}/}}}}"
done
mount --rbind /tmp/home {HOME}
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip route add default via {{gateway}}
"""


def lacking() -> list[str]:
    """What this machine lacks for such hosts, one sentence each."""
    found = missing()
    if SSHD is None:
        found.append("the command 'sshd' (package openssh-server)")
    tools = {"ssh": "openssh-client", "rsync": "rsync", "pgrep": "procps"}
    found += [f"the command {tool!r} (package {package})" for tool, package in tools.items() if not shutil.which(tool)]
    if importlib.util.find_spec("pip") is None:
        found.append("pip in this environment: python -m ensurepip")
    return found


def build_backend(folder: Path) -> str:
    """Fetch what `pip install` of this project builds with into `folder`; why not, or ""."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "setuptools>=77"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    return "" if done.returncode == 0 else f"no package registry within reach: {done.stderr.strip()[-200:]}"


def prepare(lab: Lab, host: Host, public_key: str, registry: Path) -> None:
    """Give a host its home and start its sshd on port 22, for that key only."""
    inside = host.folder / "tmp"  # its /tmp
    home = inside / "home"
    (home / ".config/pip").mkdir(parents=True)
    (home / ".ssh").mkdir(mode=0o700)
    home.chmod(0o700)
    (home / ".ssh/authorized_keys").write_text(public_key)
    (home / ".config/pip/pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {registry}\n")
    (home / ".bashrc").write_text(f"export PATH={sys.base_prefix}/bin:$PATH\n")
    (home / ".profile").write_text(". ~/.bashrc\n")
    make_key(inside / "host_key")
    (inside / "sshd_config").write_text(
        "HostKey /tmp/host_key\nPidFile none\nUsePAM no\nPasswordAuthentication no\n"
        "AuthorizedKeysFile .ssh/authorized_keys\nPermitRootLogin prohibit-password\n"
    )
    kept = {str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix)}
    below = " ".join(sorted(p for p in kept if p.startswith(HOME + "/")))
    host.check(["bash", "-c", _SET_UP.format(kept=below, gateway=lab.network[254])])
    _install(host)
    assert SSHD is not None
    host.run([SSHD, "-D", "-e", "-f", "/tmp/sshd_config"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def make_key(path: Path) -> str:
    """Make a key pair; the public part."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=30)
    return path.with_name(path.name + ".pub").read_text()


def _install(host: Host) -> None:
    """A virtual environment that sees the packages of this one, but not its editable install of this project."""
    host.check([sys.executable, "-m", "venv", "--without-pip", VENV])
    venv = host.folder / "tmp/home/.shadecast-venv"
    site = venv / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for package, name in (("ray", "ray"), ("ray", "serve"), ("pip", "pip")):
        scripts = importlib.metadata.distribution(package).entry_points.select(group="console_scripts", name=name)
        (entry,) = scripts
        script = venv / "bin" / name
        script.write_text(
            textwrap.dedent(f"""\
                #!{VENV}/bin/python
                import sys
                from {entry.module} import {entry.attr}
                sys.exit({entry.attr}())
                """)
        )
        script.chmod(0o755)

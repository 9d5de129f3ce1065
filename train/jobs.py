"""Does the work of one job of `train.loads.KINDS`, phase by phase. Runs alone: standard library only.

    python jobs.py KIND SEED FOLDER CPUS MEMORY_BYTES < phases.json

`phases.json` is a list of [name, seconds, intensity]; intensity is a share of CPUS. The name of each phase is printed
as it begins. Real programs do the work where they are installed (cc, tar, gzip, bzip2, xz, sort, find), this
interpreter and its library otherwise. FOLDER has the files of `prepare`; the job writes its own below it and removes
them.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import heapq
import json
import mmap
import os
import pickle
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

Unit = Callable[[], object]
CHUNK = bytes(range(256)) * 256
FILES = 24


def prepare(folder: Path, seed: int) -> None:
    """Some text files, C and Python sources: what the jobs of one machine read."""
    rng = random.Random(seed)
    words = [rng.randbytes(4).hex() for _ in range(400)]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for n in range(FILES):
        text = "\n".join(" ".join(rng.choices(words, k=8)) for _ in range(rng.randint(100, 900)))
        (folder / "data" / f"part-{n:02d}.txt").write_text(text)
    bodies = [f"int f{n}(int a){{int s=0;for(int i=0;i<a;i++)s+=(i*{n + 3})^(s>>1);return s;}}" for n in range(60)]
    (folder / "data" / "unit.c").write_text("\n".join(bodies))
    (folder / "data" / "unit.py").write_text(
        "\n".join(f"def f{n}(a):\n    return [a * {n} for _ in range(3)]" for n in range(99))
    )


class Worker:
    """One job's state: its random numbers, its folder, and what phases leave to each other."""

    def __init__(self, seed: int, folder: Path, memory_bytes: int) -> None:
        self.rng = random.Random(seed)
        self.data = sorted((folder / "data").glob("part-*.txt"))
        self.sources = folder / "data"
        self.scratch = Path(tempfile.mkdtemp(dir=folder))
        self.memory_bytes = memory_bytes
        self.held: list[object] = []
        self.runs: list[list[int]] = [sorted(self.rng.choices(range(10**6), k=3000)) for _ in range(4)]
        self._peer: socket.socket | None = None

    def peer(self) -> socket.socket:
        """A connection over loopback to a thread that takes all and answers nothing."""
        if self._peer is None:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                self._peer = socket.create_connection(listener.getsockname())
                other, _ = listener.accept()

            def swallow() -> None:
                while other.recv(1 << 16):
                    pass

            threading.Thread(target=swallow, daemon=True).start()
        return self._peer

    def hold(self, size: int, share: float) -> None:
        """Keep a block of memory, as long as all blocks take less than this share of the machine's."""
        if sum(len(b) for b in self.held if isinstance(b, bytearray)) + size < share * self.memory_bytes:
            self.held.append(bytearray(b"\x01") * size)


def program(*words: str, cwd: Path | None = None) -> None:
    """Run a program to its end; what it says is not wanted."""
    subprocess.run(words, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, check=False)  # noqa: S603


def shell(text: str, cwd: Path) -> None:
    """Run a line of shell."""
    program("/bin/sh", "-c", text, cwd=cwd)


def read(w: Worker) -> Unit:
    """Read and split one file."""
    return lambda: len(w.rng.choice(w.data).read_text().split())


def sort(w: Worker) -> Unit:
    """Sort a run of numbers and keep it."""

    def unit() -> None:
        w.runs = [*w.runs[-7:], sorted(w.rng.choices(range(10**6), k=2000))]
        w.hold(1 << 20, 0.3)

    return unit


def shuffle(w: Worker) -> Unit:
    """Send partitions over loopback."""
    return lambda: w.peer().sendall(pickle.dumps(w.rng.choice(w.runs)) * 4)


def merge(w: Worker) -> Unit:
    """Merge sorted runs into a file."""
    target = w.scratch / "merged"

    def unit() -> None:
        text = "\n".join(map(str, heapq.merge(*w.runs)))
        with open(target, "a" if target.exists() and target.stat().st_size < 1 << 23 else "w") as file:
            file.write(text)

    return unit


def configure(w: Worker) -> Unit:
    """Small programs, one after the other."""
    return lambda: shell("test -d . && echo yes | grep -c y", w.scratch)


def compile_unit(w: Worker) -> Unit:
    """Compile one file: C where there is a compiler, Python otherwise."""
    cc = shutil.which("cc") or shutil.which("gcc")
    if cc is None:
        return lambda: program(sys.executable, "-I", "-m", "compileall", "-qf", str(w.sources))
    numbers = iter(range(10**9))

    def unit() -> None:
        program(cc, "-O1", "-c", str(w.sources / "unit.c"), "-o", str(w.scratch / f"unit-{next(numbers) % 8}.o"))

    return unit


def link(w: Worker) -> Unit:
    """Put what was compiled into a library."""
    cc, objects = shutil.which("cc") or shutil.which("gcc"), sorted(map(str, w.scratch.glob("unit-0.o")))
    if cc and objects:
        return lambda: program(cc, "-shared", "-o", str(w.scratch / "library.so"), *objects)
    return compile_unit(w)


def download(w: Worker) -> Unit:
    """Bytes over loopback, written to a file."""
    target = w.scratch / "weights"

    def unit() -> None:
        for _ in range(8):
            w.peer().sendall(CHUNK)
        if not target.exists() or target.stat().st_size < w.memory_bytes // 8:
            with open(target, "ab") as file:
                file.write(CHUNK * 8)

    return unit


def load(w: Worker) -> Unit:
    """Map a large file and copy it into memory."""
    target = w.scratch / "weights"
    if not target.exists() or not target.stat().st_size:
        target.write_bytes(CHUNK * 64)
    with open(target, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def unit() -> None:
        at = w.rng.randrange(0, max(1, len(mapped) - (1 << 20)))
        w.hold(1 << 20, 0.5)
        zlib.crc32(mapped[at : at + (1 << 20)])

    return unit


def warm_up(w: Worker) -> Unit:
    """Copies in memory."""
    block = bytearray(CHUNK * 16)
    return lambda: zlib.adler32(bytes(block)[::-1])


def serve(w: Worker) -> Unit:
    """A few requests over loopback."""

    def unit() -> None:
        for n in range(20):
            w.peer().sendall(json.dumps({"id": n, "items": w.rng.choices(range(1000), k=40)}).encode())

    return unit


def serialise(w: Worker) -> Unit:
    """Pickle a large structure into a file."""
    state = {n: [w.rng.random() for _ in range(200)] for n in range(20)}
    target = w.scratch / "state"

    def unit() -> None:
        with open(target, "ab" if target.exists() and target.stat().st_size < 1 << 24 else "wb") as file:
            file.write(pickle.dumps(state, protocol=0))

    return unit


def write(w: Worker) -> Unit:
    """Write and wait until it is on the disk."""
    target = w.scratch / "written"

    def unit() -> None:
        with open(target, "wb") as file:
            file.write(CHUNK * 8)
            file.flush()
            os.fsync(file.fileno())

    return unit


def scan(w: Worker) -> Unit:
    """Look at every file, read one."""

    def unit() -> None:
        sum(entry.stat().st_size for entry in os.scandir(w.sources))
        w.rng.choice(w.data).read_bytes()

    return unit


def vacuum(w: Worker) -> Unit:
    """Insert into a database, delete half of it, and compact it."""
    base = sqlite3.connect(w.scratch / "base.db", isolation_level=None)
    base.execute("CREATE TABLE IF NOT EXISTS items (id INTEGER, value TEXT)")

    def unit() -> None:
        base.execute("BEGIN")
        base.executemany("INSERT INTO items VALUES (?, ?)", [(w.rng.randrange(10**6), "x" * 50) for _ in range(300)])
        base.execute("DELETE FROM items WHERE id % 2 = 0")
        base.execute("COMMIT")
        base.execute("VACUUM")

    return unit


def fill(w: Worker) -> Unit:
    """Allocate objects that live on."""

    def unit() -> None:
        if len(w.held) < 20_000:
            w.held.append([{"n": n, "s": str(n)} for n in range(50)])
        w.hold(1 << 18, 0.3)

    return unit


def collect(w: Worker) -> Unit:
    """Objects in cycles, and the collector that finds them."""

    def unit() -> None:
        for n in range(300):
            one: list[object] = [n]
            one.append(one)
        gc.collect()

    return unit


def archive(w: Worker) -> Unit:
    """Pack and compress a folder."""
    packers = [name for name in ("gzip", "bzip2", "xz") if shutil.which(name)]
    kind = w.rng.choice(packers or ["gz"])
    if packers and shutil.which("tar"):
        return lambda: shell(f"tar -cf - -C '{w.sources}' . | {kind} -3 > archive", w.scratch)

    def unit() -> None:
        with tarfile.open(w.scratch / "archive", "w:gz", compresslevel=3) as packed:
            packed.add(w.sources, arcname=".")

    return unit


def verify(w: Worker) -> Unit:
    """Checksums of files."""
    return lambda: hashlib.sha256(w.rng.choice(w.data).read_bytes()).hexdigest()


def run(w: Worker) -> Unit:
    """Short programs over the files, as a job table starts them."""
    lines = (
        "sort part-00.txt | uniq -c | wc -l",
        "find . -name '*.txt' | wc -l",
        "cat part-*.txt | tr a-f A-F | cksum",
    )
    return lambda: shell(w.rng.choice(lines), w.sources)


def load_data(w: Worker) -> Unit:
    """Read, pack and unpack a batch."""
    return lambda: zlib.decompress(zlib.compress(w.rng.choice(w.data).read_bytes()[:8000], 1))


def steps(w: Worker) -> Unit:
    """Products of small matrices, and now and then a batch that is read."""
    size = 24
    matrix = [[w.rng.random() for _ in range(size)] for _ in range(size)]

    def unit() -> None:
        columns = list(zip(*matrix, strict=True))
        [[sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in matrix]
        if w.rng.random() < 0.1:
            w.rng.choice(w.data).read_bytes()

    return unit


def evaluate(w: Worker) -> Unit:
    """Numbers into text and back."""
    table = [{"id": n, "values": [w.rng.random() for _ in range(10)]} for n in range(60)]
    return lambda: json.loads(json.dumps(table))


WORK: Mapping[str, Callable[[Worker], Unit]] = {
    "read": read,
    "sort": sort,
    "shuffle": shuffle,
    "reduce": merge,
    "configure": configure,
    "compile": compile_unit,
    "link": link,
    "download": download,
    "load": load,
    "warm_up": warm_up,
    "serve": serve,
    "gather": read,
    "serialise": serialise,
    "write": write,
    "scan": scan,
    "merge": merge,
    "vacuum": vacuum,
    "fill": fill,
    "collect": collect,
    "list": scan,
    "archive": archive,
    "verify": verify,
    "run": run,
    "morning": serve,
    "noon": serve,
    "evening": serve,
    "load_data": load_data,
    "steps": steps,
    "evaluate": evaluate,
}


def used_s() -> float:
    """CPU of this process and of the programs that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def spend(seconds: float, cpus: float, unit: Unit) -> None:
    """Do units for so long; rest between them, so that they take no more than `cpus` on average."""
    began_s, before_s = time.monotonic(), used_s()
    while (passed_s := time.monotonic() - began_s) < seconds:
        unit()
        early_s = (used_s() - before_s) / cpus - (time.monotonic() - began_s)
        if early_s > 0.0:
            time.sleep(min(early_s, max(seconds - passed_s, 0.0)))


def main(argv: list[str]) -> None:
    """Do one job."""
    seed, folder, cpus, memory_bytes = int(argv[1]), Path(argv[2]), float(argv[3]), int(argv[4])
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("600")  # where memory ends, the job ends and not the machine
    worker = Worker(seed, folder, memory_bytes)
    try:
        for name, seconds, intensity in json.load(sys.stdin):
            print(name, flush=True)
            spend(seconds, max(cpus * intensity, 0.001), WORK[name](worker))
    finally:
        shutil.rmtree(worker.scratch, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What the operating system is asked, with an answer where it lacks what Linux has. Knows no
torch."""

import contextlib
import ctypes
import fcntl
import os
import resource
import sys
from pathlib import Path


def cores():
    """Number of CPU cores that this process may use."""
    with contextlib.suppress(AttributeError):         # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory():
    """Bytes of the host's memory that are free, for this process or container; half of all memory
    where the system does not tell."""
    try:
        # Not SC_AVPHYS_PAGES, which counts no page that only caches a file
        lines = Path('/proc/meminfo').read_text().splitlines()
        free = 1024 * int(dict(line.split(':') for line in lines)['MemAvailable'].split()[0])
    except (OSError, KeyError):
        free = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2
    with contextlib.suppress(OSError):                # a system without control groups
        group = Path('/proc/self/cgroup').read_text().rpartition('::/')[2].strip()
        folder = Path('/sys/fs/cgroup', group)
        free = min(free, *(left_in(place) for place in (folder, *folder.parents)))
    return free


def left_in(folder):
    """Bytes that a control group (version 2) leaves, a container's or a Slurm job's; infinity if
    it sets no limit, or `folder` is none."""
    try:
        limit, used = (int((folder / f'memory.{name}').read_text()) for name in ('max', 'current'))
        counts = dict(line.split() for line in (folder / 'memory.stat').read_text().splitlines())
        return limit - used + int(counts['inactive_file'])
    except (OSError, ValueError):                     # for example the limit "max"
        return float('inf')


def most_memory():
    """The most memory that this process held, bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == 'darwin' else 1024 * most


def keep_large_buffers():
    """Let glibc keep large buffers: a training step takes twice as long if their pages are faulted
    in again."""
    with contextlib.suppress(OSError, AttributeError):               # other C libraries
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def lock(file, wait):
    """Lock an open file for this process, or `wait` until its holder lets go of it: True, or False
    if another holds it; OSError where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False

"""What must hold before processes on several nodes work together."""
import contextlib
import socket
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

from facekit.errors import InputError

PATIENCE = 5               # seconds until a network file system shows a new file everywhere


def everywhere(value, group):
    """The values (any picklable objects) of all processes, in rank order; `group` is over gloo."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def check_gpus(gpus):
    """Refuse processes that share a GPU; `gpus` are the identifiers of each process's."""
    for number, gpu in enumerate(gpus):
        if gpus.index(gpu) < number:
            raise InputError(f'processes {gpus.index(gpu)} and {number} have the same GPU: start '
                             'one process a GPU and the launcher once a node')


def check_folders(cfg, group):
    """Refuse nodes that do not see what process 0 reads and writes; all processes must call it."""
    inputs = [cfg.data.root, cfg.data.public, cfg.teacher.checkpoint, cfg.judge.checkpoint,
              cfg.mae.init, cfg.fr.init, cfg.reconstruct.key, cfg.release, cfg.originals]
    with contextlib.ExitStack() as stack:
        paths = [path for path in inputs if path and Path(path).exists()]
        if dist.get_rank() == 0:
            folder = Path(cfg.run.folder)
            folder.mkdir(parents=True, exist_ok=True)
            mark = stack.enter_context(tempfile.NamedTemporaryFile(prefix='.shared-', dir=folder))
            paths.append(str(folder / Path(mark.name).name))
        paths, end = everywhere(paths, group)[0], time.time() + PATIENCE
        while (missing := [p for p in paths if not Path(p).exists()]) and time.time() < end:
            time.sleep(0.2)
        reports = everywhere((socket.gethostname(), missing), group)
    for number, (host, missing) in enumerate(reports):
        if missing:
            path = Path(missing[0])
            path = path.parent if path.name.startswith('.shared-') else path
            raise InputError(f'process {number} on {host} does not see {path} of process 0: all '
                             'nodes must share run.folder and what is read, under the same '
                             'paths, and be started in the same folder')

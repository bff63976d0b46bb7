"""What every script needs around its own work: processes, checkpoints, the log line, the launch.

Nothing here knows about faces. A script ends with `runtime.launch(main, __doc__, help)`.
"""
import argparse
import contextlib
import ctypes
import datetime
import errno
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from config import CONFIGS, namespace, resolve
from records import InputError

# ------------------------------------------------------------------------------ processes

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def say(*text):
    """Print on the first process only."""
    if rank() == 0:
        print(*text, flush=True)


def start_processes(cfg):
    """Join the other torchrun processes, if any, and return this one's device."""
    cuda = torch.cuda.is_available() and cfg.run.device != 'cpu'
    if cfg.run.device == 'cuda' and not cuda:
        raise InputError('run.device = cuda, but torch sees no GPU: use run.device=auto, or '
                         'install the torch build for your driver')
    device = torch.device('cpu')
    if cuda:
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0))
                              % torch.cuda.device_count())
        torch.cuda.set_device(device)
    processes = int(os.environ.get('WORLD_SIZE', 1))
    if processes > 1 and not dist.is_initialized():
        # Building CASIA's cache keeps the others waiting for minutes, not for an hour.
        dist.init_process_group('nccl' if cuda else 'gloo', timeout=datetime.timedelta(hours=1))
    torch.set_num_threads(cfg.run.threads or max(1, (os.cpu_count() or 1) // processes))
    if not cuda:
        # glibc hands large buffers back to the kernel at once and faults each page in again at
        # the next step; keeping them doubles the speed of large batches on the CPU
        with contextlib.suppress(OSError, AttributeError):          # other C libraries
            libc, trim, mmap = ctypes.CDLL(None), -1, -3            # M_TRIM_, M_MMAP_THRESHOLD
            libc.mallopt(mmap, 1 << 30)
            libc.mallopt(trim, (1 << 31) - 1)
    if cfg.run.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if cuda:
        # Losses, cosines and rankings are float32 in truth; the nets have autocast
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = cfg.run.precision != 'fp32'
        torch.backends.cudnn.benchmark = not cfg.run.deterministic
    return device


def share(batch, what):
    """This process's slice of a global batch, which must divide evenly."""
    if batch % world():
        raise InputError(f'{what} = {batch} does not divide by {world()} processes: '
                         f'use {batch // world() * world() or world()}')
    size = batch // world()
    return slice(rank() * size, (rank() + 1) * size)


def average_gradients(parameters):
    """Mean of the gradients over all processes, in one message."""
    if world() > 1:
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, piece in zip(grads, flat.div_(world()).split([g.numel() for g in grads])):
            g.copy_(piece.view_as(g))


def autocast(device, precision):
    """Context for the forward pass; fp32 leaves everything alone."""
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': None}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def mean(values):
    """Mean of a tensor over all processes."""
    if world() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values / world()


def check_finite(losses, step, path):
    """Stop the run when a loss is no number any more; the last checkpoint stays as it is."""
    bad = [name for name, value in losses.items() if not np.isfinite(value)]
    if bad:
        raise InputError(f'{" and ".join(bad)} became {losses[bad[0]]} at step {step}; {path} '
                         'keeps the last good state: try a smaller lr, a longer warm-up or '
                         'run.precision=fp32')


class Stop:
    """SIGTERM and Ctrl-C ask for a last checkpoint; Ctrl-C again ends the process at once."""
    mine = False                     # of the process, not of one training in it

    def __init__(self):
        self.agreed = False
        # Agreeing over gloo keeps the device out of it: no GPU sync in the training loop
        self.group = dist.new_group(backend='gloo') if world() > 1 else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    @staticmethod
    def ask(number, frame):
        if Stop.mine and number == signal.SIGINT:     # Slurm and torchrun both send SIGTERM
            raise KeyboardInterrupt
        Stop.mine = True

    def checkpoint_due(self, want):
        """True for all processes at the same step, once any wants to save or was asked to stop."""
        flags = torch.tensor([int(want), int(self.mine)])
        if self.group:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        self.agreed = bool(flags[1])
        return bool(flags.any())

    def leave(self):
        """End the process if it was asked to, once the state is saved."""
        if self.agreed:
            say('stopped on request; the same command continues from here')
            raise KeyboardInterrupt

    @staticmethod
    def end():
        """Behind the loop a signal ends the process at once again."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if Stop.mine:
            raise KeyboardInterrupt


def again(script, *extra):
    """The command that runs another script with this one's arguments, for a sentence."""
    return shlex.join(['python', script, *(a for a in sys.argv[1:] if not a.startswith('stage=')),
                       *extra])


def provenance():
    """What a result depends on beside the config: versions, hardware, commit."""
    commit = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=12'],
                            cwd=CONFIGS, capture_output=True, text=True).stdout.strip()
    device = (torch.cuda.get_device_name() if torch.cuda.is_available()
              else f'CPU, {os.cpu_count()} cores')
    return {'commit': commit or 'unknown', 'device': device, 'processes': world(),
            'python': sys.version.split()[0], 'torch': torch.__version__,
            'numpy': np.__version__}


# ------------------------------------------------------------------------------- log line

class Log:
    """One JSON object a line in log.jsonl, and one status line for people.

    A stage that continues from `step` first drops its own later lines, so that the log of an
    interrupted run reads like that of an undisturbed one.
    """

    def __init__(self, folder, stage, total, step=0):
        self.path, self.stage, self.total = Path(folder) / 'log.jsonl', stage, total
        self.begin, self.first = time.time(), step
        if rank():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text, kept = self.path.read_text() if self.path.exists() else '', ''
        for line in text.splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):    # cut short by a kill
                entry = json.loads(line)
                if entry['stage'] != stage or entry['step'] <= step:
                    kept += line + '\n'
        if kept != text:                # another process of this run may be writing its own lines
            temporary = self.path.with_name('log.jsonl.tmp')
            temporary.write_text(kept)
            temporary.replace(self.path)

    def seconds(self):
        """Seconds since this process began the stage."""
        return max(time.time() - self.begin, 1e-9)

    def __call__(self, step, images, **values):
        """Log `values` at `step`; `images` is how many the run has taken since it (re)started."""
        if rank():
            return
        seconds = self.seconds()
        peak = (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else
                resident_bytes()) / 2 ** 30
        eta = seconds / max(step - self.first, 1) * (self.total - step)
        values = {k: float(f'{v:.6g}') if isinstance(v, float) else v for k, v in values.items()}
        entry = {'stage': self.stage, 'step': step, **values,
                 'images_per_second': round(images / seconds, 1), 'seconds': round(seconds, 2),
                 'memory_gib': round(peak, 2)}
        with open(self.path, 'a') as f:
            f.write(json.dumps(entry) + '\n')
        shown = '  '.join(f'{k} {v:.4g}' for k, v in values.items())
        print(f'[{self.stage}] {step}/{self.total}  {shown}  {images / seconds:,.0f} images/s  '
              f'ETA {datetime.timedelta(seconds=round(eta))}  {peak:.1f} GiB', flush=True)


def stage_seconds(run):
    """Wall time of each stage, from log.jsonl: an interrupted stage is the sum of its pieces."""
    total, last = {}, {}
    log = run / 'log.jsonl'
    for line in log.read_text().splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            stage, seconds = entry['stage'], float(entry['seconds'])
        total[stage] = total.get(stage, 0) + seconds - (
            last.get(stage, 0) if seconds > last.get(stage, 0) else 0)
        last[stage] = seconds
    return {stage: round(seconds, 1) for stage, seconds in total.items()}


def resident_bytes():
    """Peak resident memory of this process, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -------------------------------------------------------------------------------- launch

def launch(main, doc, compare):
    """Parse the command line, run `main(cfg, device, compare)`; wrong input becomes one sentence.

    cfg is the resolved config as nested namespaces (`cfg.mae.lr`). Exit code 0 = done, 2 = wrong
    input, 130 = stopped by the keyboard.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.
                                     RawDescriptionHelpFormatter)
    parser.add_argument('--config', default=str(CONFIGS / 'toy.yaml'), help='YAML file')
    parser.add_argument('--compare', action='store_true', help=compare)
    parser.add_argument('set', nargs='*', metavar='section.key=value', help='see casia.yaml')
    args = parser.parse_intermixed_args()

    def refuse(sentence):
        print(f'error: {sentence}', file=sys.stderr, flush=True)
        os._exit(2) if world() > 1 else sys.exit(2)

    try:
        cfg = namespace(resolve(args.config, args.set))
        main(cfg, start_processes(cfg), args.compare)
    except InputError as e:
        refuse(e)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and not e.filename:                   # no path is wrong, but the code is
            raise
        remedy = 'free space or choose another run.folder' if full else 'check path and rights'
        refuse(f'{e.filename or cfg.run.folder}: {e.strerror}: {remedy}, then run the same '
               'command again')
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, MemoryError) or re.search('out of memory|allocate memory', str(e)):
            refuse(f'memory is too small ({" ".join(str(e).split())[:150]}): choose a smaller '
                   'net, mae.micro_batch, fr.norm_batch or reconstruct.batch')
        if re.search(r'No working C\+\+ compiler|Failed to find C compiler', str(e)):
            refuse('run.compile = true finds no C++ compiler: install g++, or use '
                   'run.compile=false')
        if world() == 1 or not re.search('[Cc]onnection|NCCL|[Tt]imed out|[Tt]imeout', str(e)):
            raise
        refuse(f'another process of this run died or hangs ({str(e).splitlines()[0][:150]}): see '
               'its message; the same command continues from the last checkpoint')
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)       # no traceback of a process that leaves
        if dist.is_initialized():
            dist.destroy_process_group()

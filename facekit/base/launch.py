"""How a stage begins and ends: command line, signals, errors as sentences.

A stage ends with `launch(main)`.
"""
import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import traceback

import numpy as np
import torch
import torch.distributed as dist

from facekit.base.config import CONFIGS, namespace, resolve
from facekit.base.errors import InputError, printable
from facekit.base.files import digest
from facekit.base.process import Group, barrier, device_name, say, start_processes, world

VERSION = '2.0'
# What torchrun, Slurm and a terminal that closes send to a run that has to leave
ENDING = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2


def on_ending_signals(action):
    """Let `action` answer the signals that end a run, but for those that nohup lets pass."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, action)


class Stop:
    """A cluster's signals and Ctrl-C ask for a last checkpoint; Ctrl-C again ends the process at
    once."""
    requested = False                # of the process, not of one training in it
    interrupted = False              # whether Ctrl-C is ending the process

    def __init__(self):
        self.agreed = False
        on_ending_signals(self.request)
        signal.signal(signal.SIGINT, self.request)

    @staticmethod
    def request(number, frame):
        if Stop.requested and number == signal.SIGINT:     # Slurm and torchrun both send SIGTERM
            Stop.interrupt(number, frame)
        Stop.requested = True

    @staticmethod
    def interrupt(number, frame):
        Stop.interrupted = True
        raise KeyboardInterrupt

    def checkpoint_due(self, wanted):
        """True on all processes at the same step, once any wants to save or was asked to stop."""
        flags = torch.tensor([int(wanted), int(self.requested)])
        if world() > 1:        # over gloo, which keeps the device out of it
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=Group.host)
        self.agreed = bool(flags[1])
        return bool(flags.any())

    def leave_if_requested(self):
        """End the process if it was asked to, once the state is saved."""
        if self.agreed:
            barrier()          # torchrun ends them all with the first, and rank 0 still writes
            raise KeyboardInterrupt

    @staticmethod
    def end():
        """After the loop a signal ends the process at once again."""
        on_ending_signals(signal.SIG_DFL)
        signal.signal(signal.SIGINT, Stop.interrupt)
        if Stop.requested:
            raise KeyboardInterrupt


def command(script, *extra):
    """The command that runs another script with this one's arguments, for a sentence."""
    arguments = [a for a in sys.argv[1:] if not a.startswith('stage=')]
    return shlex.join(['python', os.path.join(os.path.dirname(sys.argv[0]), script), *arguments,
                       *extra])


def commit():
    """The kit's git commit, or its version where it is no clone."""
    name = ''
    with contextlib.suppress(OSError):                            # no git
        if (CONFIGS.parent / '.git').exists():                    # else it is another repository's
            name = subprocess.run(         # without tags, which are the user's own words
                ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*'],
                cwd=CONFIGS, capture_output=True, text=True).stdout.strip()
    return name or f'version {VERSION}'


def made_by(script):
    """What code makes a checkpoint: the kit's commit, and a digest of the nets, the loss and the
    steps of a stage, whose file is `script`, whatever their line ends."""
    paths = 'models.py', 'irm.py', 'facekit/nets/training.py', script
    texts = [(CONFIGS.parent / path).read_bytes().replace(b'\r\n', b'\n') for path in paths]
    return {'commit': commit(), 'code': digest(b'\0'.join(texts))}


def provenance(device):
    """What a result depends on beside the config: versions, hardware, commit."""
    return {'commit': commit(), 'device': device_name(device), 'processes': world(),
            'python': sys.version.split()[0], 'torch': torch.__version__,
            'numpy': np.__version__}


class Screen:
    """Standard output, or another stream, that costs nothing that was computed: once it is closed
    or full, what is written to it is lost, and the run goes on."""

    def __init__(self, stream):
        self.stream = stream
        with contextlib.suppress(OSError, AttributeError):     # of what is no file
            stream.reconfigure(errors='backslashreplace')      # Cyrillic names, ASCII screen

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):              # ValueError: it was closed by this process
            nowhere = open(os.devnull, 'w')
            with contextlib.suppress(OSError, ValueError):      # what is still in its buffer, too
                os.dup2(nowhere.fileno(), self.stream.fileno())
            self.stream = nowhere
        return len(text)


def launch(main, check=None):
    """Parse the command line and run `main(cfg, device, compare)`, or, with --check, which only a
    stage that gives a `check` has, check(cfg, compare).

    Exit code 0 = done, 2 = wrong input, which becomes one sentence, 130 = stopped by the keyboard.
    base/start.py answers --help.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--config')
    parser.add_argument('--compare', action='store_true')
    if check:
        parser.add_argument('--check', action='store_true')
    parser.add_argument('set', nargs='*')
    args = parser.parse_intermixed_args()
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
    cfg = None
    try:
        signal.signal(signal.SIGINT, Stop.interrupt)
        words = args.set
        if not args.config and words and '=' not in words[0]:
            args.config, *words = words
        cfg = namespace(resolve(args.config or CONFIGS / 'toy.yaml', words))
        if cfg.reconstruct.remove and os.path.basename(sys.argv[0]) != 'reconstruct.py':
            raise InputError('reconstruct.remove takes people out of a finished run: give it to '
                             'reconstruct.py alone')
        if check and args.check:
            check(cfg, args.compare)
        else:
            main(cfg, start_processes(cfg), args.compare)
            barrier()                  # torch 2.6 hangs where a group ends before its last message
    except (Exception, KeyboardInterrupt) as error:
        # A library's C code can make another exception of a Ctrl-C
        if Stop.interrupted or isinstance(error, KeyboardInterrupt):
            say('stopped: the same command continues from the last checkpoint, or begins again')
            leave(130)
        if sentence := explanation(error, cfg):
            print(f'error: {printable(sentence)}', file=sys.stderr)
            leave(2)
        traceback.print_exc()
        leave(1)
    leave(0)


def leave(code):
    """End the process with an exit code. Where it failed, others wait for this one: it takes no
    leave of them, and its launcher ends them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)       # no traceback of a process that leaves
    sys.stdout.flush()
    sys.stderr.flush()
    if code and dist.is_initialized() and dist.get_world_size() > 1:
        os._exit(code)
    if dist.is_initialized():
        Group.host = None                              # or its threads abort the process
        dist.destroy_process_group()
    sys.exit(code)


def explanation(error, cfg):
    """The sentence that tells a user what an exception means, or '' for a fault of the code; cfg:
    the config, or None if that could not be read."""
    if isinstance(error, InputError):
        return str(error)
    text = ' '.join(str(error).split())[:150]
    if isinstance(error, OSError):
        folder = cfg.run.folder if cfg else os.getcwd()
        return (f'{error.filename or f"a file below {folder}"}: {error.strerror or text}: check '
                'path, rights and space, then run the same command again')
    if type(error).__module__.startswith(('torch._inductor', 'torch._dynamo')):
        return (f'run.compile=true fails ({text}): install a C++ compiler and the headers of '
                'Python (g++, python3-dev), or use run.compile=false')
    if re.search('EADDRINUSE|[Aa]ddress already in use', str(error)):
        return (f'port {os.environ.get("MASTER_PORT")} is taken by another run: start torchrun '
                'with --standalone, or with another --master_port')
    if isinstance(error, MemoryError) or re.search('out of memory|allocate memory', text):
        return (f'memory is too small ({text}): choose a smaller net, mae.micro_batch, '
                'fr.norm_batch or reconstruct.batch')
    if (isinstance(error, RuntimeError) and world() > 1
            and re.search('[Cc]onnection|NCCL|[Tt]imed out|[Tt]imeout', text)):
        return (f'another process of this run died or hangs ({text}): see its message; the same '
                'command continues from the last checkpoint')
    return ''

"""Reading a checkpoint, also a hostile one: nothing in it runs, and memory stays bounded."""
import argparse
import contextlib
from pathlib import Path

import torch

from records import InputError


KINDS = {'config': dict, 'images': str, 'step': int, 'steps': int, 'logged': int, 'net': dict,
         'head': dict, 'model': dict, 'optimizer': dict, 'scaler': dict, 'std': float,
         'mean': torch.Tensor, 'sums': torch.Tensor}        # what our checkpoints hold


class Checkpoint(dict):
    """The dict of a checkpoint, which says in a sentence what it lacks."""

    def __missing__(self, key):
        raise InputError(f'{self.path} lacks {key!r}, as no checkpoint of ours does: delete it, '
                         'make it again or name another')


@contextlib.contextmanager
def at_most(more):
    """Let this process take at most so many more bytes (Linux alone can)."""
    try:
        import resource                              # not on Windows
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (
        min(x for x in (used + more, *old) if x != resource.RLIM_INFINITY), old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def read(path):
    """A checkpoint (path of an existing file) as a Checkpoint of tensors and plain values."""
    try:
        # A few bytes can promise terabytes: packed, or as an array of zeros. And
        # facebookresearch/mae keeps its arguments in the checkpoint, as plain values.
        with (at_most(2 * Path(path).stat().st_size + (1 << 30)),
              torch.serialization.safe_globals([argparse.Namespace])):
            found = torch.load(path, map_location='cpu', weights_only=True)
        saved = Checkpoint(found) if isinstance(found, dict) else None
    except MemoryError:
        raise InputError(f'{path} asks for far more memory than its size explains and may be '
                         'malicious: do not use it') from None
    except Exception as e:  # torch raises a different type for each way a file can be damaged
        # What is wrong stands behind a preface on weights_only and before advice
        reason = str(e).rpartition('WeightsUnpickler error: ')[2].split('. ')[0][:120]
        reason = ''.join(x if x.isprintable() else ' ' for x in reason) or type(e).__name__
        raise InputError(f'{path} is no checkpoint that can be read safely ({reason.strip()}): '
                         'download or make it again') from None
    if saved is None:
        raise InputError(f'{path} holds a {type(found).__name__}, not a dict of tensors: save '
                         'its state_dict()')
    saved.path = path
    if {'config', 'images', 'steps'} <= saved.keys():       # it is one of ours
        wrong = [k for k, kind in KINDS.items() if k in saved and not isinstance(saved[k], kind)]
        if wrong:
            raise InputError(f'{path} holds a {type(saved[wrong[0]]).__name__} as {wrong[0]!r}: '
                             'delete it and make it again')
    return saved

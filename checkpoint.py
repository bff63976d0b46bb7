"""Checkpoints, notes, secret of a run: written whole or not at all, read without running code."""
import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import resource
import secrets
from pathlib import Path

import torch

import runtime
from config import CONFIGS, as_dict
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
    """Let this process take at most so many more bytes."""
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (
        min(x for x in (used + more, *old) if x != resource.RLIM_INFINITY), old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def make_once(path, ready, make):
    """Unless ready(): make() what `path` shall be, in one of the runs that start together.

    Its rank 0 makes it, all others wait. A file system without locks, as on some clusters, leaves
    that to the user.
    """
    if runtime.rank() == 0 and not ready():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + '.lock'), 'w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                runtime.say(f'another run is making {path}: waiting for it')
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:                 # no locks here
                pass
            if not ready():
                make()
    runtime.barrier()


def save(path, state):
    """Write a checkpoint (tensors and plain values) whole or not at all; rank 0 alone writes."""
    if runtime.rank():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        with open(temporary, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        raise InputError(f'{path} could not be written ({str(e).splitlines()[0]}): free space '
                         'and run the same command again; the last checkpoint is whole') from None


def load(path, made_by=''):
    """A checkpoint as a dict of tensors and plain values; nothing in the file is executed.

    `made_by` is the command that makes the file, for the sentence that says it is missing.
    """
    if not Path(path).is_file():
        raise InputError(f'{path} is missing: ' + (f'first run `{made_by}`' if made_by else
                                                   'check the path'))
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


def load_finished(path, made_by):
    """A checkpoint whose training ran to its end; published ones count no steps."""
    saved = load(path, made_by)
    step, steps = (x if isinstance(x, int) else None          # a file can hold anything
                   for x in (saved.get('step', 0), saved.get('steps', 0)))
    if None in (step, steps) or step < steps:
        raise InputError(f'{path} is only trained to step {step} of {steps}: first run '
                         f'`{made_by}` to its end')
    return saved


# Keys that change how a thing is made but not what it is
HARMLESS = {'mae.micro_batch', 'mae.preview_epochs', 'reconstruct.batch', 'reconstruct.photos',
            'reconstruct.key'}


def same_premises(saved, cfg, keys, path, images=''):
    """Refuse to continue what was made with another config (the named sections or keys) or from
    other images (data.digest)."""
    now, then = as_dict(cfg), saved['config']
    differ = [] if saved.get('images', images) == images else ['the training images']
    for key in keys:
        section, _, name = key.partition('.')
        old, new = then.get(section, {}), now[section]
        for n in [name] if name else sorted(new):
            if old.get(n) != new[n] and f'{section}.{n}' not in HARMLESS:
                differ.append(f'{section}.{n} ({old.get(n)!r} then, {new[n]!r} now)')
    if differ:
        raise InputError(f'{path} was made with another config: {", ".join(differ)}; change it '
                         'back, or use another run.folder or mae.name')


def release_secret(cfg):
    """The secret of a run's releases, drawn once: bytes."""
    path = Path(cfg.reconstruct.key or Path(cfg.run.folder) / 'release.key')
    if cfg.reconstruct.key and not path.is_file():
        raise InputError(f'reconstruct.key = {path} does not exist: leave it empty to have a new '
                         'secret drawn')
    make_once(path, path.exists, lambda: draw_secret(path))
    secret, drawn = path.read_bytes().strip(), (Path(cfg.data.root) / 'toy.bin').exists()
    if not drawn and secret == (CONFIGS / 'toy.key').read_bytes().strip():
        raise InputError(f'reconstruct.key = {path} is known to everybody, and {cfg.data.root} '
                         'are no drawn faces: set reconstruct.key= for a secret of your own')
    return secret


def draw_secret(path):
    """Write a new secret that the user alone can read, or refuse where the old one is lost."""
    if any(path.parent.rglob('release.json')):
        raise InputError(f'{path} is missing, but releases were made with it: put it back, or '
                         'use another run.folder')
    temporary = path.with_name('release.key.tmp')
    temporary.touch(mode=0o600)
    temporary.write_text(secrets.token_hex(32) + '\n')
    temporary.replace(path)


def fingerprint(content):
    return hashlib.sha256(content).hexdigest()


def secret_seed(secret, purpose):
    """63-bit seed that reveals nothing of the secret nor of the other purposes' seeds."""
    return int.from_bytes(hashlib.sha256(secret + purpose.encode()).digest()[:8], 'big') >> 1


def write_json(path, content):
    """Write numbers and plain values as JSON, whole or not at all, on rank 0."""
    if runtime.rank() == 0:
        temporary = Path(f'{path}.tmp')
        temporary.write_text(json.dumps(content, indent=1) + '\n')
        temporary.replace(path)


def read_json(path):
    """The object in a JSON file of a run, or a sentence."""
    try:
        found = json.loads(Path(path).read_text())
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    raise InputError(f'{path} is missing or damaged: put it back, or delete what was made with it')

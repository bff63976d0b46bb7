"""Files of a run: written whole or not at all, by one run at a time, read without running code."""
import argparse
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import mmap
import os
import pickle
import pickletools
import shutil
import time
import zipfile
from pathlib import Path

import torch

from facekit import run
from facekit.config import as_dict
from facekit.errors import InputError

# What our checkpoints hold, and of which type
KINDS = {'config': dict, 'made_from': dict, 'step': int, 'steps': int,
         'logged': int, 'net': dict, 'head': dict, 'model': dict, 'optimizer': dict,
         'scaler': dict, 'std': float, 'mean': torch.Tensor, 'sums': torch.Tensor}


# ---------------------------------------------------------------------- writing and reading

@contextlib.contextmanager
def replacing(path):
    """A binary file to write that takes the place of `path` once it is whole.

    Only one run may write a path at a time (see only_writer): the draft's name is fixed, so that
    what a killed run left is overwritten by the next.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + '.tmp')
    try:
        with open(draft, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())     # a power cut shall not leave an empty file behind a name
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path):
    """An empty folder to fill that takes the place of the folder `path` once it is whole.

    A draft that was not finished stays until the next try, as after a kill.
    """
    draft = path.with_name(path.name + '.tmp')
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    replace_folder(path, draft)


def replace_folder(path, draft):
    """Let a folder that is whole take the place of the folder `path`."""
    shutil.rmtree(path, ignore_errors=True)
    os.sync()                           # see replacing()
    draft.rename(path)


def write_json(path, content):
    """Write numbers and plain values as JSON on rank 0."""
    if run.rank() == 0:
        with replacing(path) as file:
            file.write(json.dumps(content, indent=1).encode() + b'\n')


def open_bytes(path):
    """The bytes of a file, mapped into memory; InputError if it cannot be read."""
    try:
        if not Path(path).is_file():    # to open a pipe would wait for ever
            raise ValueError('no such file')
        with open(path, 'rb') as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:          # ValueError: an empty file cannot be mapped
        raise InputError(f'{str(path)!r} cannot be read ({error}): check the path, copy the file '
                         'again; a .rec needs its .idx beside it') from None


def read_json(path):
    """The object in a JSON file of a run, or a sentence."""
    try:
        content = json.loads(Path(path).read_text())
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    raise InputError(f'{path} is missing or damaged: put it back, or delete what was made with it')


# ---------------------------------------------------------------------------------- locks

@contextlib.contextmanager
def only_writer(path):
    """While inside, this run alone writes `path`; another that wants to waits with a sentence.

    The lock ends with its process, however that ends. A file system without locks, as on some
    clusters, leaves it to the user to start nothing twice.
    """
    with contextlib.ExitStack() as stack:
        if run.rank() == 0:
            stack.enter_context(locked(Path(path)))
        run.barrier()
        yield


@contextlib.contextmanager
def locked(path):
    """Hold the lock <path>.lock while inside; waits for another process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + '.lock'), 'ab') as file:
        waiting = False
        while is_taken(file):
            if not waiting:
                run.say(f'another run is making {path}: waiting for it')
            waiting = True
            time.sleep(0.2)
        yield


def is_taken(file):
    """Whether another process holds the lock of an open file; else this one does from now on, or
    the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    return False


def make_once(path, ready, make):
    """Unless ready(): make() what `path` shall be, on rank 0 of one of the runs that ask."""
    def make_if_needed():
        if not ready():
            with only_writer(path):
                if not ready():
                    make()

    run.on_rank_0(make_if_needed)


# ----------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, state):
    """Write a dict of tensors and plain values on rank 0."""
    if run.rank():
        return
    try:
        with replacing(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        raise InputError(f'{path} could not be written ({str(error).splitlines()[0]}): free space '
                         'and run the same command again; the last checkpoint is whole') from None


def load_checkpoint(path, made_by='', needs=()):
    """A checkpoint as a dict of tensors and plain values; nothing in the file is executed.

    `made_by` is the command that makes the file, for the sentence that says it is missing; `needs`
    are the keys that it must have.
    """
    if not Path(path).is_file():
        raise InputError(f'{path} is missing: ' + (f'first run `{made_by}`' if made_by else
                                                   'check the path'))
    state = read_tensors(path)
    if not isinstance(state, dict):
        raise InputError(f'{path} holds a {type(state).__name__}, not a dict of tensors: save '
                         'its state_dict()')
    ours = {'config', 'step', 'steps'} <= state.keys()
    wrong = [k for k, kind in KINDS.items() if ours and k in state
             and not isinstance(state[k], kind)]
    if wrong:
        raise InputError(f'{path} holds a {type(state[wrong[0]]).__name__} as {wrong[0]!r}: '
                         'delete it and make it again')
    if missing := [k for k in needs if k not in state]:
        raise InputError(f'{path} lacks {missing[0]!r}, as no checkpoint of ours does: delete it, '
                         'make it again or name another')
    return state


def read_tensors(path):
    """What a file of torch.save holds, without running code; InputError if it is not safe."""
    try:
        with open(path, 'rb') as file:
            if file.read(4) != b'PK\3\4':        # torch looks at the same bytes
                raise InputError(f'{path} is no zip file, as torch.save has written since version '
                                 '1.6: download it again, or load and save it with a newer torch')
        Outline(path).load()
        # facebookresearch/mae keeps its arguments in the checkpoint, as plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except InputError:
        raise
    except MemoryError:
        raise InputError(f'{path} asks for far more memory than its size explains and may be '
                         'malicious: do not use it') from None
    except Exception as error:   # torch raises a different type for each way a file can be damaged
        # What is wrong stands behind a preface on weights_only and before advice
        reason = str(error).rpartition('WeightsUnpickler error: ')[2].split('. ')[0][:120]
        reason = ''.join(x if x.isprintable() else ' ' for x in reason) or type(error).__name__
        raise InputError(f'{path} is no checkpoint that can be read safely ({reason.strip()}): '
                         'download or make it again') from None


class Outline(pickle.Unpickler):
    """Goes through the pickle in a checkpoint without making a tensor or calling what it names;
    MemoryError if it asks for more than the file holds.

    A few bytes can promise terabytes: packed, as a call that makes zeros, as one number that
    stands for many, as copies. torch.save packs nothing and stores each number. Afterwards the
    memory that torch.load takes is bounded by the size of the file.
    """
    # Bytes of a number in torch.FloatStorage and so on
    BYTES = {'Byte': 1, 'Char': 1, 'Bool': 1, 'Short': 2, 'Half': 2, 'BFloat16': 2, 'Int': 4,
             'Float': 4, 'Long': 8, 'Double': 8}
    PLAIN = ('collections.OrderedDict', 'collections.Counter', '__builtin__.set', 'torch.Size',
             'argparse.Namespace')

    def __init__(self, path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            self.sizes = {x.filename.partition('/')[2]: x.file_size for x in entries}
            packed = any(x.compress_type != zipfile.ZIP_STORED for x in entries)
            # torch takes a and A for one name
            twice = len({x.filename.lower() for x in entries}) < len(entries)
            if packed or twice or sum(self.sizes.values()) > Path(path).stat().st_size:
                raise MemoryError
            content = archive.read(next(x for x in entries if x.filename.endswith('/data.pkl')))
        self.copied, self.length = 0, len(content)
        for operation, argument, _ in pickletools.genops(content):
            # pickle makes room for every number below the one that something is kept under
            if 'PUT' in operation.name and argument > self.length:
                raise MemoryError
        super().__init__(io.BytesIO(content))

    def find_class(self, module, name):
        """What stands for a function or class that the pickle names."""
        outline = self

        class Plain(dict):
            """Stands for an object that copies what it is made of."""
            def __init__(self, *parts):
                outline.count_copied(*parts)

            def __setstate__(self, state):
                outline.count_copied(*state if isinstance(state, tuple) else [state])

        if module == 'torch' and name.removesuffix('Storage') in self.BYTES:
            return self.BYTES[name.removesuffix('Storage')]
        if f'{module}.{name}' in self.PLAIN:
            return Plain
        if module == 'torch._utils' and name in ('_rebuild_tensor_v2', '_rebuild_parameter'):
            return getattr(self, name)
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')

    def count_copied(self, *parts):
        """MemoryError if more is copied than the pickle has bytes: it can name a thing often."""
        self.copied += sum(map(len, parts))
        if self.copied > self.length:
            raise MemoryError

    def persistent_load(self, storage):
        """How many numbers a storage has."""
        _, size, key, _, length = storage
        if size * length != self.sizes[f'data/{key}']:
            raise MemoryError
        return length

    def _rebuild_tensor_v2(self, length, offset, shape, stride, requires_grad, hooks):
        if len(shape) > 64 or math.prod(shape) > length:
            raise MemoryError

    def _rebuild_parameter(self, tensor, requires_grad, hooks):
        return tensor


def load_finished(path, made_by, needs=()):
    """A checkpoint whose training ran to its end; published ones count no steps."""
    state = load_checkpoint(path, made_by, needs)
    step, steps = (x if isinstance(x, int) else None          # a file can hold anything
                   for x in (state.get('step', 0), state.get('steps', 0)))
    if None in (step, steps) or step < steps:
        raise InputError(f'{path} is only trained to step {step} of {steps}: first run '
                         f'`{made_by}` to its end')
    return state


# ----------------------------------------------------------------------------------- parts

def public_dict(cfg):
    """as_dict() for files that are shared: who asked to be left out is nobody's business, so that
    their number stands for their names."""
    config = as_dict(cfg)
    config['data']['exclude'] = len(cfg.data.exclude)
    return config


def entry(mapping, key):
    """mapping[key] if it is a dict, else an empty one."""
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def digest(content):
    """SHA-256 of bytes, 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def digest_of_weights(state):
    """SHA-256 of a state_dict's tensors and their names, 64 hex digits."""
    total = hashlib.sha256()
    for name in sorted(state):
        content = state[name].cpu().reshape(-1).view(torch.uint8)    # numpy has no bfloat16
        total.update(name.encode() + content.numpy().tobytes())
    return total.hexdigest()

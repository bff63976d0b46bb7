"""Checkpoints: written whole, read without running code, and the nets in them."""
import argparse
import functools
import hashlib
import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path

import torch

import models
from facekit.base import files, process
from facekit.base.errors import InputError
from facekit.base.files import replacing
from facekit.nets.published import is_published, published

# What our checkpoints hold, and of which type
KINDS = {'config': dict, 'made_from': dict, 'step': int, 'steps': int,
         'logged': int, 'net': dict, 'head': dict, 'model': dict, 'optimizer': dict,
         'scaler': dict, 'std': float, 'mean': torch.Tensor, 'sums': torch.Tensor}
NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values on rank 0."""
    if process.rank():
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


def digest_of_weights(state):
    """SHA-256 of a state_dict's tensors and their names, 64 hex digits."""
    total = hashlib.sha256()
    for name in sorted(state):
        content = state[name].cpu().reshape(-1).view(torch.uint8)    # numpy has no bfloat16
        total.update(name.encode() + content.numpy().tobytes())
    return total.hexdigest()


def load_weights(module, state, path):
    """Load a state_dict, ours or a published one, or say in a sentence why it does not fit."""
    state = tensors(unwrapped(state))
    own = module.state_dict()
    if missing := [k for k in own if k.startswith('decoder') and k not in state]:
        if len(missing) == len([k for k in own if k.startswith('decoder')]):
            raise InputError(f'{path} holds an encoder only: take the full checkpoint, with '
                             'decoder, of the same pre-training')
    wrong = sorted(set(own) ^ set(state)) or sorted(
        k for k in own if own[k].shape != state[k].shape)
    if wrong:
        raise InputError(f'{path} does not fit: {len(wrong)} keys differ, first '
                         f'{wrong[0][:80]!r}: use a checkpoint of this architecture or change '
                         'its keys in the config')
    wrong = [k for k in own if not is_sound(state[k])]
    if wrong:
        raise InputError(f'{path} holds no finite numbers in {wrong[0]!r}: make it again')
    if next(module.parameters()).is_meta:
        module.to_empty(device='cpu')
    module.load_state_dict(state)


def unwrapped(state):
    """The state_dict in a checkpoint of ours, of facebookresearch/mae or of arcface_torch."""
    for name in ('model', 'net', 'state_dict', 'state_dict_backbone'):
        state = state[name] if isinstance(state.get(name), dict) else state
    return state


def tensors(state):
    """The tensors of a state_dict by their names, without DistributedDataParallel's prefix."""
    return {k.removeprefix('module.'): v for k, v in state.items()
            if isinstance(k, str) and torch.is_tensor(v)}


def is_sound(tensor):
    """Whether a tensor from a file (see Outline) holds finite numbers."""
    return tensor.dtype in NUMBERS and bool(tensor.isfinite().all())


def recogniser(path, device, made_by='', onnx_pixels='signed', fold=None):
    """A recogniser (eval mode): an IResNet from our checkpoint or insightface's, or a published
    one of another kind (see published.py). `made_by`: see load_checkpoint(); of a
    Fold only one that learnt from its public images."""
    if is_published(path):
        return published(path, onnx_pixels)
    saved = load_finished(path, made_by)
    if fold:
        fold.check_learnt(saved, path, made_by)
    return recogniser_from(saved, path, device)


def recogniser_from(saved, path, device):
    """The IResNet (eval mode) in a loaded checkpoint, its size read off the keys."""
    try:
        state = tensors(unwrapped(saved))
        stem, fc = state['conv1.weight'], state['fc.weight']
        layers = [len({k.split('.')[1] for k in state if k.startswith(f'layer{i}.')})
                  for i in range(1, 5)]
        side = round((fc.shape[1] / state['bn2.weight'].numel()) ** 0.5)
        size = saved['config']['data']['size'] if 'config' in saved else 16 * side
        with torch.device('meta'):           # takes no memory, before its shapes are compared
            net = models.IResNet(layers, stem.shape[0], max(1, int(size)), fc.shape[0])
    except Exception:                        # a file can hold anything
        raise InputError(f'{path} is no insightface IResNet: it lacks conv1, layer1-4, bn2 or fc; '
                         'use a backbone of arcface_torch') from None
    load_weights(net, state, path)
    return net.to(device, memory_format=torch.channels_last).eval()


def digest_of(path):
    """SHA-256 of the weights of a recogniser, however they are wrapped and without the state of an
    optimizer; '' without such a file."""
    path = Path(path)
    return digest_of_file(path, path.stat().st_mtime_ns) if path.is_file() else ''


@functools.cache
def digest_of_file(path, changed):
    """digest_of() a file that was last changed at `changed`, ns: once in a run."""
    if is_published(path):
        return files.digest(path.read_bytes())
    saved = load_checkpoint(path)
    return ' '.join(digest_of_weights(tensors(state)) for state in (
        unwrapped(saved), files.entry(saved, 'head')))

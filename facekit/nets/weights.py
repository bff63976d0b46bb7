"""Checkpoints: written whole, read without running code, and the nets in them."""
import argparse
import functools
import hashlib
import shlex
import zipfile
from pathlib import Path

import torch

import models
from facekit.base import files, process
from facekit.base.errors import InputError
from facekit.base.files import replacing
from facekit.nets.published import is_published, published

# What our checkpoints hold, and of which type
KINDS = {'config': dict, 'step': int, 'steps': int, 'logged': int, 'net': dict, 'head': dict,
         'model': dict, 'optimizer': dict, 'scaler': dict, 'std': float, 'mean': torch.Tensor,
         'sums': torch.Tensor}
MOST_BLOCKS = 1031         # of an IResNet: those of arcface_torch's largest, iresnet2060
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
    """A checkpoint as a dict of tensors and plain values, without running code. `made_by`: the
    command that makes it, for the sentence that it is missing; needs: keys that it must have."""
    if not Path(path).is_file():
        raise InputError(f'{path} is missing: ' + (f'first run `{made_by}`' if made_by else
                                                   'check the path'))
    state = read_tensors(path)
    if not isinstance(state, dict):
        raise InputError(f'{path} holds a {type(state).__name__}, not a dict of tensors: save '
                         'its state_dict()')
    if not all(map(is_plain, tensors_in(state))):
        raise InputError(f'{path} does not hold the numbers of a tensor, or not plainly (sparse, '
                         'nested, quantized, expanded ...): save dense copies, '
                         'tensor.clone().contiguous() of each')
    for key in needs:
        if not isinstance(state.get(key), KINDS[key]):
            raise InputError(f'{path} has no sound {key!r}, as every checkpoint of ours has: '
                             'delete it, make it again or name another')
    return state


def read_tensors(path):
    """What a file of torch.save holds, without running code; InputError if it is not safe."""
    try:
        check_sizes(path)
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


def check_sizes(path):
    """MemoryError if a checkpoint would become larger than its file: torch.save packs nothing."""
    if Path(path).suffix == '.safetensors':
        code = ('import torch, safetensors.torch as s; '
                f'torch.save(s.load_file({str(path)!r}), {str(Path(path).with_suffix(".pth"))!r})')
        raise InputError(f'{path} is a safetensors file, which is not read: convert it by `pip '
                         f'install safetensors` and `python -c {shlex.quote(code)}`')
    with open(path, 'rb') as file:
        if file.read(4) != b'PK\3\4':            # torch looks at the same bytes
            raise InputError(f'{path} is no zip file, as torch.save has written since version '
                             '1.6: download it again, or load and save it with a newer torch')
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = any(x.compress_type != zipfile.ZIP_STORED for x in entries)
    names = {x.filename.lower() for x in entries}          # torch takes a and A for one name
    size = sum(x.file_size for x in entries)
    if packed or len(names) < len(entries) or size > Path(path).stat().st_size:
        raise MemoryError


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
    if [any(k.startswith('decoder') for k in keys) for keys in (own, state)] == [True, False]:
        raise InputError(f'{path} holds an encoder only: take the full checkpoint, with decoder, '
                         'of the same pre-training')
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


def tensors_in(state):
    """Every tensor in what a file holds, however deep; a list can hold itself."""
    waiting, seen = [state], set()
    while waiting:
        value = waiting.pop()
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def is_plain(tensor):
    """Whether a tensor from a file lies on the CPU as its numbers, one after another, and the file
    holds each of them; some bytes can promise terabytes, as one number that stands for many."""
    return (type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == 'cpu'
            and tensor.layout == torch.strided
            and not (tensor.is_nested or tensor.is_quantized or tensor.is_conj()
                     or tensor.is_neg())
            and tensor.nbytes <= tensor.untyped_storage().nbytes())


def is_sound(tensor):
    """Whether a tensor of a checkpoint holds finite numbers."""
    return tensor.dtype in NUMBERS and bool(tensor.isfinite().all())


def recogniser(path, device, made_by='', onnx_pixels='signed', fold=None):
    """A recogniser (eval mode): an IResNet from our checkpoint or insightface's, or a published
    one; of a Fold only one that learnt from its public images."""
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
        if sum(layers) > MOST_BLOCKS:        # each takes a millisecond, and a file names millions
            raise ValueError
        side = round((fc.shape[1] / state['bn2.weight'].numel()) ** 0.5)
        size = saved['config']['data']['size'] if 'config' in saved else 16 * side
        with torch.device('meta'):           # takes no memory, before its shapes are compared
            net = models.IResNet(layers, stem.shape[0], max(1, int(size)), fc.shape[0])
    except Exception:                        # a file can hold anything
        raise InputError(f'{path} is no insightface IResNet: it lacks conv1, layer1-4, bn2 or fc, '
                         f'or has over {MOST_BLOCKS} blocks; use a backbone of '
                         'arcface_torch') from None
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

"""Recognisers from any checkpoint, and the embeddings of whole image sets."""
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import models
from facekit import files, images, run
from facekit.batches import Store
from facekit.errors import InputError
from facekit.faces import ImageRows
from facekit.published import is_published, published

NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


# ------------------------------------------------------------------------------- weights

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
    """Whether a tensor from a file (see files.Outline) holds finite numbers."""
    return tensor.dtype in NUMBERS and bool(tensor.isfinite().all())


def recogniser(path, device, made_by='', onnx_pixels='signed', fold=None):
    """A recogniser (eval mode): an IResNet from our checkpoint or insightface's, or a published
    one of another kind (see facekit/published.py). `made_by`: see files.load_checkpoint(); of a
    Fold only one that learnt from its public images."""
    if is_published(path):
        return published(path, onnx_pixels)
    saved = files.load_finished(path, made_by)
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
    saved = files.load_checkpoint(path)
    return ' '.join(files.digest_of_weights(tensors(state)) for state in (
        unwrapped(saved), files.entry(saved, 'head')))


# ---------------------------------------------------------------------------- embeddings

def for_recogniser(batch, net):
    """uint8 (B, H, W, 3) or float (B, 3, H, W) in 0..1 -> what an IResNet takes: -1..1, its size.

    The result keeps the gradient and lies in channels_last memory.
    """
    x = images.to_float(batch) if batch.dtype == torch.uint8 else batch
    if x.shape[-1] != net.size:
        x = F.interpolate(x, (net.size, net.size), mode='bilinear', align_corners=False)
    return (2 * x - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def embed_batch(net, batch, precision):
    """Embeddings float32 (B, d) of uint8 images (B, H, W, 3)."""
    with run.autocast(batch.device, precision):
        return net(for_recogniser(batch, net)).float()


def embed_all(net, store, batch, precision, joined=False):
    """Embeddings of every image of a Store and of its mirror image: float32 (2, N, d).

    If they shall be `joined`, (1, N, d) of unit vectors of their sums, which lie on the host where
    they would take a quarter of the device's free memory.

    The processes take turns at the batches and gather them round by round, so the result does not
    depend on their number and no process holds it twice.
    """
    numbers = torch.arange(len(store)).split(batch)
    faces = store.ahead(numbers[run.rank()::run.world()])
    length = embedding_length(net, store.device)
    needed = 4 * len(store) * length
    on_host = joined and needed > max(run.free_memory(store.device) / 4, 1 << 30)
    out = torch.empty(1 if joined else 2, len(store), length,
                      device='cpu' if on_host else store.device)
    for first in range(0, len(numbers), run.world()):
        own = torch.zeros(len(out), batch, length, device=store.device)
        if first + run.rank() < len(numbers):
            both = next(faces)
            plain, mirrored = (embed_batch(net, x, precision) for x in (both, both.flip(2)))
            own[:, :len(both)] = (F.normalize(plain + mirrored)[None] if joined
                                  else torch.stack([plain, mirrored]))
        for rows, z in zip(numbers[first:], run.gathered(own[None])):
            out[:, rows[0]:rows[-1] + 1] = z[:, :len(rows)]
    return out


def embedding_length(net, device):
    """How many numbers an embedding of a recogniser has."""
    if isinstance(net, models.IResNet):
        return net.fc.out_features
    blank = torch.zeros(1, 3, net.size, net.size, device=device)
    return net(blank).shape[1]


def unit_embeddings(net, chosen, cfg, device):
    """f(x) + f(mirrored x) of ImageRows, L2-normalised, float32 (N, d), see embed_all(). Raises
    InputError where they are not finite."""
    batch = cfg.evaluate.batch
    if device.type == 'cpu':         # a laptop's memory: the largest maps of a batch take 256 MiB
        width = net.conv1.out_channels if isinstance(net, models.IResNet) else 64
        batch = min(batch, max(1, (1 << 26) // (net.size ** 2 * width)))
    store = Store(chosen, device, once=True)
    z = embed_all(net, store, batch, cfg.run.precision, joined=True)[0]
    if not z.isfinite().all():
        raise InputError(f'a recogniser gives no finite numbers in run.precision = '
                         f'{cfg.run.precision}: set run.precision=fp32, or make it again')
    return z


def pixel_embeddings(chosen, device):
    """16 x 16 pixels of ImageRows, contrast-normalised, as unit vectors float32 (N, 768)."""
    small = []
    for part in Store(chosen, device, once=True).ahead(torch.arange(len(chosen)).split(4096)):
        x = part.permute(0, 3, 1, 2).float()
        x = F.adaptive_avg_pool2d(x, 16).flatten(2)
        small.append(F.normalize((x - x.mean(2, keepdim=True)).flatten(1)))
    return torch.cat(small)


@dataclass
class Embedder:
    """What an attacker compares images by: a recogniser, or plain pixels."""
    name: str                        # tells it from the other embedders of a group
    net: torch.nn.Module | None      # an IResNet; None = pixels
    cfg: object                      # the config, for batch size and precision
    device: torch.device
    gallery: torch.Tensor | None = None      # unit embeddings of a group's originals, once made
    gallery_rows: np.ndarray | None = None   # int64 (N,): of which

    def embed(self, chosen):
        """Unit embeddings float32 (N, d) of ImageRows."""
        if self.net is None:
            return pixel_embeddings(chosen, self.device)
        return unit_embeddings(self.net, chosen, self.cfg, self.device)

    def embed_images(self, faces):
        """Unit embeddings float32 (N, d) of uint8 images (N, H, W, 3)."""
        return self.embed(ImageRows(faces, np.arange(len(faces))))

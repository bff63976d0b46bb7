"""Recognisers from any checkpoint, and the embeddings of whole image sets."""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import models
from facekit.base import process
from facekit.base.errors import InputError
from facekit.data import images
from facekit.data.batches import Store
from facekit.data.faces import ImageRows


def for_recogniser(batch, net):
    """uint8 (B, H, W, 3) or float (B, 3, H, W) in 0..1 -> what an IResNet takes: -1..1, its size,
    channels_last; the gradient is kept."""
    x = images.to_float(batch) if batch.dtype == torch.uint8 else batch
    if x.shape[-1] != net.size:
        x = F.interpolate(x, (net.size, net.size), mode='bilinear', align_corners=False)
    return (2 * x - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def embed_batch(net, batch, precision):
    """Embeddings float32 (B, d) of uint8 images (B, H, W, 3)."""
    with process.autocast(batch.device, precision):
        return net(for_recogniser(batch, net)).float()


def embed_all(net, store, batch, precision, joined=False):
    """Embeddings of every image of a Store and of its mirror image, float32 (2, N, d), or `joined`
    the unit vectors of their sums, (1, N, d), on the host where the device has little memory.

    The processes take turns at the batches and gather them round by round, so the result does not
    depend on their number and no process holds it twice.
    """
    numbers = torch.arange(len(store)).split(batch)
    faces = store.ahead(numbers[process.rank()::process.world()])
    if isinstance(net, models.IResNet):        # a forward pass of one image would be tuned anew
        length = net.fc.out_features
    else:
        length = net(torch.zeros(1, 3, net.size, net.size, device=store.device)).shape[1]
    needed = 4 * len(store) * length
    on_host = joined and needed > max(process.free_memory(store.device) / 4, 1 << 30)
    out = torch.empty(1 if joined else 2, len(store), length,
                      device='cpu' if on_host else store.device)
    for first in range(0, len(numbers), process.world()):
        own = torch.zeros(len(out), batch, length, device=store.device)
        if first + process.rank() < len(numbers):
            both = next(faces)
            plain, mirrored = (embed_batch(net, x, precision) for x in (both, both.flip(2)))
            own[:, :len(both)] = (F.normalize(plain + mirrored)[None] if joined
                                  else torch.stack([plain, mirrored]))
        for rows, z in zip(numbers[first:], process.gathered(own[None])):
            out[:, rows[0]:rows[-1] + 1] = z[:, :len(rows)]
    return out


def unit_embeddings(net, chosen, cfg, device):
    """f(x) + f(mirrored x) of ImageRows, L2-normalised, float32 (N, d), see embed_all(). Raises
    InputError where they are not finite."""
    batch = cfg.evaluate.batch
    if device.type == 'cpu':         # a laptop's memory: the largest maps of a batch take 256 MiB
        width = net.conv1.out_channels if isinstance(net, models.IResNet) else 64
        batch = min(batch, max(1, (1 << 26) // (net.size ** 2 * width)))
    store = Store(chosen, device)
    z = embed_all(net, store, batch, cfg.run.precision, joined=True)[0]
    if not z.isfinite().all():
        remedy = 'make it again, or name another'
        if cfg.run.precision != 'fp32':
            remedy = f'set run.precision=fp32, or {remedy}'
        raise InputError(f'a recogniser gives no finite numbers in run.precision = '
                         f'{cfg.run.precision}: {remedy}')
    return z


def pixel_embeddings(chosen, device):
    """16 x 16 pixels of ImageRows, contrast-normalised, as unit vectors float32 (N, 768)."""
    small = []
    for part in Store(chosen, device).ahead(torch.arange(len(chosen)).split(4096)):
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

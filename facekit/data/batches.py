"""Batches on the device: which images, in which order, with which random numbers.

What is random about an image depends on (seed, purpose, epoch, image number) alone, never on
batch, process or device, so that a run can be interrupted or spread over more GPUs.
"""
import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from facekit.base.errors import InputError


class Store:
    """ImageRows as batches on the device; index i means the i-th of the rows."""

    def __init__(self, chosen, device):
        self.chosen, self.device = chosen, torch.device(device)

    def __len__(self):
        return len(self.chosen)

    def gathered(self, indices):
        """uint8 (B, H, W, 3) where the images are, pinned where a GPU fetches them; indices: int64
        (B,) on the host."""
        return pinned(self.chosen.take(np.asarray(indices)).tensor(), self.device)

    def ahead(self, choices):
        """The batches of an iterable of indices, uint8 (B, H, W, 3) on the device; while one is
        used, a thread gathers the next on the host."""
        if self.chosen.on_gpu():
            for indices in choices:
                yield to_device(self.gathered(indices), self.device)
            return
        with ThreadPoolExecutor(1) as pool:
            waiting = None
            for indices in itertools.chain(choices, [None]):
                begun = None if indices is None else pool.submit(self.gathered, indices)
                if waiting:
                    yield to_device(waiting.result(), self.device)
                waiting = begun


def pinned(tensor, device):
    """A tensor of the host in memory from which a GPU, if `device` is one, can copy it while the
    host goes on: a copy of pageable memory would wait until the device has done all its work."""
    if tensor.device.type == 'cpu' and device.type == 'cuda':
        return tensor.pin_memory()
    return tensor


def to_device(tensor, device):
    """A tensor on a device, to which it is copied while the host goes on, see pinned()."""
    return pinned(tensor, device).to(device, non_blocking=device.type == 'cuda')


class Order:
    """Which images form the global batch of a step: a pure function of (seed, step).

    Each epoch is a seeded permutation of 0..count-1 whose last incomplete batch is dropped. `name`
    is the config's name of the batch size.
    """

    def __init__(self, count, batch, seed, name):
        if batch > count:
            raise InputError(f'{name} = {batch} is larger than the set of {count} images: use a '
                             'smaller one')
        self.count, self.batch, self.seed = count, batch, seed
        self.steps_per_epoch = count // batch
        self.epoch = None

    def steps(self, epochs):
        """How many steps a training of `epochs` makes, whole or not: at least one."""
        return max(1, round(epochs * self.steps_per_epoch))

    def __call__(self, step):
        """Image numbers int64 (batch,) and the epoch of a step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
            self.epoch = epoch
        return self.order[number * self.batch:(number + 1) * self.batch], epoch


def in_order(order, store, steps, own):
    """For each of `steps`, numbers in rising order: the number, the epoch, the global batch as
    image numbers int64 numpy (batch,), and the images of this process's slice `own` of it, uint8
    (B, H, W, 3) on the device.

    A Store asks for the order a step ahead; tee() keeps what it was told until its images come.
    """
    planned, ahead = itertools.tee((step, *order(step)) for step in steps)
    gathered = store.ahead(batch[own] for _, batch, _ in ahead)
    for images, (step, batch, epoch) in zip(gathered, planned):
        yield step, epoch, batch, images


def mix(x):
    """Finaliser of splitmix64 on int64 tensors: one well-mixed 64-bit number for each."""
    for shift, factor in ((30, -0x40a7b892e31b1a47), (27, -0x6b2fb644ecceee15)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


def stream(seed, purpose, epoch=0):
    """The int64 that stands for (seed, purpose, epoch); other streams have nothing in common."""
    text = f'{purpose} {seed} {epoch}'.encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), signed=True)


def image_seeds(start, images):
    """One int64 for each image number (B,), of a stream()."""
    return mix(mix(torch.as_tensor(images).long()) ^ start)


def expanded(seeds, columns):
    """Random int64 (B, columns) from one seed (B,) for each row: counters through mix()."""
    step = -0x61c8864680b583eb                       # 2^64 / golden ratio: splitmix64's increment
    return mix(seeds[:, None] + step * torch.arange(1, columns + 1, device=seeds.device))


def hashed(start, images, columns):
    """Random int64 (B, columns) that depend on a stream() and the image number (B,) alone."""
    return expanded(image_seeds(start, images), columns)


def uniform(bits):
    """Random int64 -> float32 in (0, 1), never 0 or 1."""
    return ((bits >> 41 & (1 << 23) - 1).float() + 0.5) / (1 << 23)


def flipped(batch, flip):
    """Mirror the images of uint8 (B, H, W, 3) where flip (B,) is true."""
    return torch.where(flip[:, None, None, None], batch.flip(2), batch)

"""Batches on the device: which images, in which order, with which random numbers.

What is random about an image depends on (seed, purpose, epoch, image number) alone, never on
batch, process or device, so that a run can be interrupted or spread over more GPUs.
"""
import hashlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from facekit.base import process
from facekit.base.errors import InputError, counted
from facekit.data.faces import StreamedImages


class Store:
    """ImageRows as batches on the device: `store(indices) -> uint8 (B, H, W, 3)`.

    Index i means the i-th of the rows. Where images come from disk and are read more than `once`,
    they are decoded first, into the GPU's memory or the host's, if they fit there.
    """

    def __init__(self, chosen, device, once=False):
        self.rows, images = np.asarray(chosen.rows), chosen.images
        self.images = images.numpy() if torch.is_tensor(images) else images
        self.device, self.on_gpu = torch.device(device), None
        if once:
            return
        if self.device.type == 'cuda' and fits(self.images, len(self.rows), self.device):
            say_where(self.images, len(self.rows), "decoded into the GPU's memory")
            self.on_gpu = torch.cat(list(self.ahead(torch.arange(len(self.rows)).split(4096))))
        else:
            decode_once([chosen])

    def __len__(self):
        return len(self.rows)

    def __call__(self, indices):
        indices = torch.as_tensor(indices)
        if self.on_gpu is not None:
            return self.on_gpu[to_device(indices, self.device)]
        return self.gathered(indices.cpu()).to(self.device, non_blocking=True)

    def gathered(self, indices):
        """uint8 (B, H, W, 3) on the host, pinned where a GPU fetches it; indices int64 (B,)."""
        batch = torch.from_numpy(np.asarray(self.images[self.rows[np.asarray(indices)]]))
        return batch if self.device.type == 'cpu' else batch.pin_memory()

    def ahead(self, choices):
        """The batches of an iterable of indices, on the device; while one is used, a thread
        gathers the next."""
        if self.on_gpu is not None:
            yield from map(self, choices)
            return
        with ThreadPoolExecutor(1) as pool:
            waiting = None
            for indices in itertools.chain(choices, [None]):
                begun = None if indices is None else pool.submit(self.gathered, indices)
                if waiting:
                    yield waiting.result().to(self.device, non_blocking=True)
                waiting = begun


def decode_once(choices):
    """Decode into the host's memory what will be read many times: ImageRows, those of one set
    together. Where they do not fit, they are decoded whenever they are read."""
    rows_of = {}
    for chosen in choices:
        if isinstance(chosen.images, StreamedImages):
            rows_of.setdefault(chosen.images, []).append(chosen.rows)
    for images, parts in rows_of.items():
        rows = np.unique(np.concatenate(parts))
        if images.has(rows):
            continue
        images.drop()
        if fits(images, len(rows), torch.device('cpu')):
            say_where(images, len(rows), 'decoded into memory')
            images.keep(rows)
        else:
            say_where(images, len(rows), 'decoded as they are read')
            images.expect_random_order()


def fits(images, count, device):
    """Whether `count` of the images may fill a device's memory: half of what is free, which on
    the host the processes of this run share."""
    processes = 1 if device.type == 'cuda' else process.on_this_node()
    return count * math.prod(images.shape[1:]) < process.free_memory(device) / 2 / processes


def say_where(images, count, how):
    """Say how images are decoded that come from disk, if it was not said of them before."""
    if isinstance(images, StreamedImages) and how != images.said:
        images.said = how
        size = count * math.prod(images.shape[1:])
        process.say(f'{images.source.path}: {counted(count, "image")}, {size / 1e9:.3g} GB: {how}')


def to_device(tensor, device):
    """A tensor on a device. What comes from the host is pinned first and copied while the host
    goes on: a copy of pageable memory would wait until the device has done all its work."""
    if tensor.device.type == 'cpu' and device.type == 'cuda':
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == 'cuda')


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

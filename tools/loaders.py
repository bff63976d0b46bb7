"""How fast, and in how much memory, faces come from records: the kit beside a DataLoader.

    python tools/loaders.py                             # 4 million records, about 3 GB in /tmp
    python tools/loaders.py 100000 95                   # so many, of this JPEG quality

Both read the same files in the same random order, on all cores. The DataLoader decodes, mirrors and
normalises image by image in a worker process for each core, as arcface_torch's MXFaceDataset does
(with Pillow in place of mxnet). The kit decodes a batch ahead in threads and leaves the rest to the
device: "decoded" is what the host has to do where that is a GPU, "normalised" all of it. They take
turns.
"""
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))

from facekit import batches, faces, images, records, run, toy  # noqa: E402
from facekit.config import CONFIGS, namespace, resolve  # noqa: E402


class ImageByImage(Dataset):
    """Faces of records as arcface_torch's dataset makes them: float32 (3, H, W) and a label."""

    def __init__(self, path):
        self.records = records.Records(path)
        self.transform = transforms.Compose([
            transforms.ToPILImage(), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])])

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        image = np.array(Image.open(io.BytesIO(self.records[i])).convert('RGB'))
        return self.transform(image), torch.tensor(self.records.labels[i])


def decoded(faceset, choices, device):
    """The kit's batches uint8 (B, H, W, 3) of lists of rows."""
    store = batches.Store(faceset.select(np.arange(len(faceset))), device, once=True)
    yield from store.ahead(choices)


def normalised(faceset, choices, device):
    """The kit's batches, float32 (B, 3, H, W) in -1..1, mirrored at random."""
    for some in decoded(faceset, choices, device):
        flip = torch.rand(len(some), device=device) < 0.5
        yield images.to_float(batches.flipped(some, flip)).mul_(2).sub_(1)


def batches_of_loader(dataset, choices, device):
    """The DataLoader's, on the device."""
    loader = DataLoader(dataset, batch_sampler=choices, num_workers=run.cores(),
                        pin_memory=device.type == 'cuda')
    for some, _ in loader:
        yield some.to(device, non_blocking=True)


def seconds_of(produced, device):
    """Seconds that all batches but the first take: with that, workers have begun."""
    next(produced)
    begin = time.perf_counter()
    for _ in produced:
        pass
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def take_turns(path, cfg, device, batch, count, turns):
    """What bench.row() needs to know of `count` images in batches, by the kit, decoded and
    normalised, and by a DataLoader in turn: .times in seconds. Both give the same pixels, mirrored
    or not, which is checked."""
    faceset, dataset = faces.load(path, cfg), ImageByImage(path)
    rng = np.random.default_rng(0)
    ways = [(decoded, faceset), (normalised, faceset), (batches_of_loader, dataset)]
    times = [[], [], []]
    for _ in range(turns):
        choices = rng.integers(0, len(faceset), (count // batch + 1, batch)).tolist()
        for (produce, data), seconds in zip(ways, times):
            seconds.append(seconds_of(produce(data, choices, device), device))
    some = [next(iter(produce(data, choices[:1], device))) for produce, data in ways[1:]]
    light = [x.mean((1, 2, 3)).cpu() for x in some]        # a mirror changes nothing about it
    assert torch.allclose(*light, atol=1e-4), 'they give different images'
    return [SimpleNamespace(times=t, first=t[0], flops=0) for t in times]


def anonymous():
    """MiB of memory of this process that are no mapped file."""
    status = Path('/proc/self/status').read_text()
    return int(status.split('RssAnon:')[1].split()[0]) / 1024


def main(count=4_000_000, quality=5):
    """Write `count` records of 4,096 drawn faces, stream batches from all over them, and compare;
    all is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = namespace(resolve(CONFIGS / 'casia.yaml', [f'run.folder={folder}/run']))
        device = run.start_processes(cfg)
        begin, people = time.time(), np.arange(4096) // 8
        drawn = [images.encode(x, 'jpeg', quality) for first in range(0, 4096, 256) for x in
                 toy.draw(people[first:first + 256], np.arange(256) % 8, 112)]
        records.write_records(f'{folder}/faces', (drawn[i % 4096] for i in range(count)),
                              np.arange(count) // 20, 112)
        size = Path(folder, 'faces/train.rec').stat().st_size
        print(f'{count:,} records, {size / 1e9:.2f} GB, {np.mean([*map(len, drawn)]):.0f} bytes '
              f'an image, written in {time.time() - begin:.0f} s', flush=True)
        print(f'anonymous memory before: {anonymous():,.0f} MiB', flush=True)
        begin = time.time()
        faceset = faces.load(f'{folder}/faces', cfg, photos=False)
        print(f'opened and looked at in {time.time() - begin:.0f} s, '
              f'{anonymous():,.0f} MiB', flush=True)
        rng = np.random.default_rng(0)
        choices = (rng.integers(0, count, 64) for _ in range(4001))
        for number, _ in enumerate(decoded(faceset, choices, device)):
            if number % 800 == 0:
                print(f'  after {number:>5,} batches of 64: {anonymous():,.0f} MiB', flush=True)
        every = take_turns(f'{folder}/faces', cfg, device, 512, 16384, 5)
        for name, t in zip(('kit, decoded', 'kit, normalised', 'DataLoader'), every):
            speed = 16384 / np.array(t.times)
            ahead = np.array(every[2].times) / np.array(t.times)     # turn by turn
            print(f'{name:<16} {np.median(speed):7,.0f} images/s ({speed.min():,.0f} .. '
                  f'{speed.max():,.0f}), {np.median(ahead):.2f} times the DataLoader')
        print(f'{run.cores()} of {os.cpu_count()} cores, {device}, load {os.getloadavg()[0]:.1f}')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))

# SPDX-License-Identifier: MIT
"""What the paper's experiment would take on 1 to 512 GPUs: on paper, nothing here was run.

    python tools/projection.py          # prints the tables of docs/scale.md

Counted: arithmetic (torch's own counter, on tensors without memory), parameters, bytes on the wire.
Measured on a CPU core: decoding. Assumed, and named in ASSUMED: what share of its peak a GPU
reaches, and how fast the wires are.
"""
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import models
from facekit import protect
from facekit.config import CONFIGS, namespace, resolve


@dataclass
class Assumed:
    """Not measured by us."""
    peak: float = 989e12           # FLOP/s of an H100 in bf16, dense, by its data sheet
    vit: float = 0.40              # share of it that a ViT in training reaches
    resnet: float = 0.20           # and an IResNet, whose convolutions are thinner
    float32: float = 50e12         # FLOP/s of the class layer, which no TF32 rounds; at most 67e12
    in_node: float = 300e9         # bytes/s that a GPU sends to the 7 others of its node
    between: float = 40e9          # and to other nodes, with one 400 Gb/s card a GPU
    image: int = 5400              # bytes of a JPEG of 112 pixels (CASIA's train.rec / images)
    largest: int = 8192            # images a step: beyond, nobody has published a recipe


ASSUMED = Assumed()
DECODED = 9300                     # JPEGs of 112 pixels a core decodes a second (measured, Pillow)
GPUS = 1, 8, 64, 512
SETS = {'CASIA-WebFace': (490_623, 10_572, 'casia'),
        'WebFace4M': (4_235_242, 205_990, 'webface4m'),
        'WebFace42M': (42_474_558, 2_059_906, 'webface42m')}


def config(name):
    """One of configs/."""
    return namespace(resolve(CONFIGS / f'{name}.yaml'))


@dataclass
class Net:
    """What a net costs."""
    gflop: float                   # forward pass of an image
    parameters: int


@functools.cache
def mae_net(name):
    """The masked autoencoder of a config."""
    cfg = config(name)
    with FakeTensorMode():
        net = protect.build_mae(cfg.mae, cfg.data.size)
        noise = torch.zeros(1, (cfg.data.size // cfg.mae.patch) ** 2)
        return counted(net, torch.zeros(1, 3, cfg.data.size, cfg.data.size), noise,
                       cfg.mae.mask_ratio)


@functools.cache
def recogniser(depth, width, size, dim):
    """An IResNet."""
    with FakeTensorMode():
        net = models.iresnet(depth, width, size, dim).eval()
        return counted(net, torch.zeros(1, 3, size, size))


def counted(net, *inputs):
    """Net with the arithmetic of one forward pass."""
    with FlopCounterMode(display=False) as counter:
        net(*inputs)
    return Net(counter.get_total_flops() / 1e9, sum(p.numel() for p in net.parameters()))


@dataclass
class Step:
    """One step of a training on one of several GPUs."""
    batch: int                     # images of all GPUs
    arithmetic: float              # seconds
    sent: float                    # bytes that a GPU sends
    exposed: float                 # seconds of sending that the backward pass does not hide

    @property
    def seconds(self):
        return self.arithmetic + self.exposed

    @property
    def images_per_second(self):
        return self.batch / self.seconds


def step(gpus, batch, gflop_seconds, parameters, gathered):
    """A Step: `gflop_seconds` of arithmetic an image, `parameters` whose gradients are averaged
    while the backward pass (two thirds of the time) goes on, `gathered` bytes that wait."""
    own = batch / gpus
    arithmetic = own * gflop_seconds
    gradients = 2 * (gpus - 1) / gpus * 4 * parameters
    wire = ASSUMED.in_node if gpus <= 8 else ASSUMED.between
    hidden = arithmetic * 2 / 3 * (gpus > 1)
    exposed = max(0.0, gradients / wire - hidden) + gathered * (gpus - 1) / gpus / wire
    return Step(batch, arithmetic, gradients + gathered * (gpus - 1) / gpus, exposed)


def train_mae(name, cfg, gpus):
    """A step of stage 1: MAE forward and backward, teacher on originals and reconstructions and
    back to its input; relations gather two embeddings an image."""
    mae = mae_net(name)
    teacher = recogniser(cfg.teacher.depth, cfg.teacher.width, cfg.data.size, cfg.fr.dim)
    seconds = 1e9 * (3 * mae.gflop / ASSUMED.vit + 3 * teacher.gflop / ASSUMED.resnet)
    batch = min(ASSUMED.largest, max(cfg.mae.batch, 128 * gpus))
    gathered = 3 * batch * cfg.fr.dim * 4
    return step(gpus, batch, seconds / ASSUMED.peak, mae.parameters, gathered)


def train_fr(cfg, gpus, people):
    """A step of stage 3 with the class layer divided: embeddings and labels are gathered, their
    gradients summed, and each GPU compares all images with its share of the centres."""
    net = recogniser(cfg.fr.depth, cfg.fr.width, cfg.data.size, cfg.fr.dim)
    batch = min(ASSUMED.largest, max(cfg.fr.batch, 128 * gpus))
    head = 3 * 2 * cfg.fr.dim * people / 1e9                # of an image, over all GPUs
    seconds = 1e9 * (3 * net.gflop / ASSUMED.resnet + head * ASSUMED.peak / ASSUMED.float32)
    gathered = batch * (12 * cfg.fr.dim + 40)       # embeddings, their gradients, softmax, labels
    return step(gpus, batch, seconds / ASSUMED.peak, net.parameters, gathered)


def class_layer(people, gpus, cfg, batch):
    """Bytes of the class layer on one of several GPUs: centres, their gradient and momentum in
    float32, and the logits, with their gradient, of the images that are seen at a time."""
    own, rows = -(-people // gpus), min(batch, cfg.fr.norm_batch * gpus)
    return own * (3 * 4 * cfg.fr.dim + 2 * 4 * rows)


def row(name, gpus, s, images, epochs):
    """A line of a table."""
    each = s.images_per_second / gpus
    return (f'| {name} | {gpus} | {s.batch:,} | {1000 * s.seconds:,.0f} | {s.sent / 1e6:,.0f} | '
            f'{1000 * s.exposed:.0f} | {s.images_per_second:,.0f} | {each / DECODED:.1f} | '
            f'{s.images_per_second * ASSUMED.image / 1e6:,.0f} | '
            f'{images * epochs / s.images_per_second / 3600:,.1f} |')


def main():
    print('| set | GPUs | images a step | ms a step | MB sent by a GPU | ms not hidden | images/s | '
          'decode cores a GPU | MB/s read | hours |\n' + '|---' * 10 + '|')
    layers = []
    for stage in ('1', '3'):
        for name, (images, people, file) in SETS.items():
            cfg = config(file)
            for gpus in GPUS:
                if stage == '1':
                    s, epochs = train_mae(file, cfg, gpus), cfg.mae.epochs
                else:
                    s, epochs = train_fr(cfg, gpus, people), cfg.fr.epochs
                    layers.append((name, gpus, class_layer(people, gpus, cfg, s.batch)))
                print(row(f'{stage}: {name}', gpus, s, images, epochs))
    print('\n| class layer, GiB a GPU | ' + ' | '.join(map(str, GPUS)) + ' |\n'
          + '|---' * (1 + len(GPUS)) + '|')
    for name in SETS:
        print(f'| {name} | ' + ' | '.join(
            f'{size / 2**30:.2f}' for other, _, size in layers if other == name) + ' |')


if __name__ == '__main__':
    main()

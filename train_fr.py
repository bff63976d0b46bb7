# SPDX-License-Identifier: MIT
"""Stages 0 and 3 of FaceMAE: train a face recogniser, IResNet with ArcFace or CosFace.

On one device, GPU or CPU; without a config it takes toy faces, which it draws:
$ python train_fr.py stage=teacher     # on public faces; stage=judge: a second, other one
$ python train_fr.py                   # the student, on the released faces alone
$ python train_fr.py release=PATH run.folder=runs/mine     # on anybody's records or folders

On the 8 GPUs of one machine (on several: docs/casia.md):
$ torchrun --nproc_per_node=8 train_fr.py --config configs/casia.yaml

Time: the toy's teacher took 100 s with one thread of an AMD EPYC, its student 83 to 94 s. Not yet
run on a GPU; docs/scale.md has projections.

Reads   teacher, judge: data.root (or data.public); student: <run>/<row>/reconstructed
Writes  <run>/fold<k>/teacher.pt, <run>/fold<k>/judge.pt, <run>/<row>/fr.pt, <run>/log/

BatchNorm sees fr.norm_batch images at a time and its running statistics take one step for the
mean of all of them, so that a run does not depend on the number of processes. The same command
continues an interrupted run exactly.
"""
import facekit.base.start  # noqa: F401 (first: says what is not installed)

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import models
from facekit.base import process
from facekit.base.errors import InputError
from facekit.base.config import variants
from facekit.base.made_from import settings
from facekit.base.launch import launch, made_by
from facekit.data import batches, faces
from facekit.data.faces import FaceSet
from facekit.data.people import split
from facekit.nets import embed
from facekit.nets.weights import load_checkpoint, load_weights
from facekit.nets.classes import DividedHead
from facekit.nets.training import Training, load_unfinished

DIVIDE_FROM = 100_000     # people; with fewer the class layer is small beside the net
FIXED = ['data.size', 'run.precision']     # refuse to resume if one changed; roles add their own


@dataclass
class Recogniser:
    """Which recogniser is trained, and on what."""
    stage: str                # name of its log
    path: Path                # of its checkpoint
    faces: FaceSet
    rows: np.ndarray          # of `faces` that it learns from
    section: str              # of the config, with depth, width and epochs: teacher, judge or fr
    seed: int                 # of initialisation and data order
    fixed: list               # sections and keys of the config that must not change


def learning_rate(step, total, steps_per_epoch, cfg):
    """Warm-up, then steps or a cosine: a pure function of the step."""
    epoch = step / steps_per_epoch
    if epoch < cfg.warmup_epochs:
        return cfg.lr * (epoch + 1 / steps_per_epoch) / cfg.warmup_epochs
    if cfg.schedule == 'cosine':
        warm = cfg.warmup_epochs * steps_per_epoch
        return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))
    return cfg.lr * 0.1 ** sum(epoch >= drop for drop in cfg.lr_drops)


def margin(step, total, cfg):
    """The margin grows linearly between the two shares of training in fr.margin_warmup: small
    recognisers do not converge with the full margin from the first step."""
    begin, end = cfg.margin_warmup
    done = step / total
    if done >= end:
        return cfg.margin
    return cfg.margin * max(0.0, (done - begin) / (end - begin))


def augmented(x, u, strength):
    """Random zoom, turn, shift, contrast, brightness and a grey box: (B, 3, H, W) in -1..1.

    u (B, 10) are random numbers in (0, 1), one row an image; strength 1 is strong, 0 does nothing.
    """
    turn, zoom, right, down, contrast, light, *box = (strength * (2 * u - 1)).unbind(1)
    zoom = 1 + 0.15 * zoom
    theta = torch.stack([zoom * (0.2 * turn).cos(), -zoom * (0.2 * turn).sin(), 0.15 * right,
                         zoom * (0.2 * turn).sin(), zoom * (0.2 * turn).cos(), 0.15 * down], 1)
    grid = F.affine_grid(theta.view(-1, 2, 3), x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode='reflection', align_corners=False)
    level = x.mean((1, 2, 3), keepdim=True)
    contrast, light, *box = (t[:, None, None, None] for t in (contrast, light, *box))
    x = level + (x - level) * (1 + 0.4 * contrast) + 0.3 * light
    # The box appears in half of the images: its half sides are positive only there
    line = torch.linspace(-1, 1, x.shape[-1], device=x.device)
    in_columns = (line - box[0]).abs() < 0.5 * box[2]
    in_rows = (line[:, None] - box[1]).abs() < 0.5 * box[3].abs()
    return x.masked_fill(in_columns & in_rows, 0.0)


class NormStatistics:
    """One step of BatchNorm's running statistics for a batch that is seen in several parts."""

    def __init__(self, net):
        self.buffers = [b for b in net.buffers() if b.is_floating_point()]
        self.old = [torch.empty_like(b) for b in self.buffers]
        self.sums = [torch.empty_like(b) for b in self.buffers]

    def begin(self):
        """Before the first part: keep the statistics."""
        torch._foreach_copy_(self.old, self.buffers)
        torch._foreach_zero_(self.sums)

    def collect(self):
        """After a part's forward pass: keep what it made of the statistics, and go back."""
        torch._foreach_add_(self.sums, self.buffers)
        torch._foreach_copy_(self.buffers, self.old)

    def finish(self, parts):
        """Set the mean over the parts of all processes."""
        flat = process.mean(torch.cat([s.flatten() for s in self.sums]) / parts)
        torch._foreach_copy_(self.buffers, flat.split([b.numel() for b in self.buffers]))


def norm_batch(share, cfg):
    """How many images BatchNorm sees at a time; InputError if they do not divide a process's."""
    own, part = share.stop - share.start, min(cfg.norm_batch, cfg.batch)
    if own % part or part < 2:
        raise InputError(f'fr.norm_batch = {part} does not divide the {own} images of a process: '
                         f'use fewer processes, or fr.norm_batch={own} in every run to compare')
    return part


def class_layer(classes, c):
    """A MarginHead, or a DividedHead where classes are divided over the processes or sampled; and
    whether they are divided."""
    wanted = c.shard_classes == 'true' or c.shard_classes == 'auto' and classes >= DIVIDE_FROM
    divided = wanted and 1 < process.world() <= classes
    settings = c.dim, classes, c.loss, c.scale, c.margin_gradient
    if not divided and c.sample_rate == 1:
        return models.MarginHead(*settings), False
    share = (process.rank(), process.world()) if divided else (0, 1)
    return DividedHead(*settings, c.sample_rate, share), divided


def classify(head, z, labels, margin):
    """Cross-entropy and accuracy, scalars, of this process's embeddings (n, dim), or, where the
    classes are divided, of those of all processes."""
    output = head(z, labels, margin)
    if isinstance(output, tuple):          # a DividedHead's, which has no logits of all classes
        return output
    hits = (output.detach().argmax(1) == labels).float()
    return F.cross_entropy(output, labels), hits.mean()


def make_net(cfg, task, resumed):
    """The backbone to train, with new weights or, for a student, those of fr.init."""
    c, init = getattr(cfg, task.section), cfg.fr.init
    net = models.iresnet(c.depth, c.width, cfg.data.size, cfg.fr.dim)
    if init and task.section == 'fr' and not resumed:
        load_weights(net, load_checkpoint(init), init)
    return net


def make_optimizer(net, head, c, device):
    """SGD with momentum over all weights that are trained, the class centres last."""
    parameters = [p for p in [*net.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, momentum=c.momentum, weight_decay=c.weight_decay,
                                fused=device.type == 'cuda')
    for p in parameters:
        # Where fp16's first step overflows, a fused SGD would take any memory for its momentum
        optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
    return optimizer


def random_numbers(task, epoch, rows):
    """Which images are mirrored, bool (B,), and numbers in (0, 1) for augmented(), (B, 10)."""
    flips, augmentation = (batches.stream(task.seed, f'{task.section} {purpose}', epoch)
                           for purpose in ('flips', 'augmentation'))
    return (batches.hashed(flips, rows, 1)[:, 0] > 0,
            batches.uniform(batches.hashed(augmentation, rows, 10)))


def train(cfg, task, device):
    """Train a Recogniser, or continue where an interrupted run stopped."""
    c, path = cfg.fr, task.path
    own = process.own_share(c.batch, 'fr.batch')           # this process's slice of a global batch
    size = norm_batch(own, c)
    order = batches.Order(len(task.rows), c.batch, task.seed, 'fr.batch')
    steps = order.steps(getattr(cfg, task.section).epochs)
    made_from = settings(cfg, FIXED + task.fixed) | {
        'set of images': task.faces.digest(task.rows)}
    code = made_by('train_fr.py')
    saved = load_unfinished(path, made_from, code, ['net', 'head'])
    if saved and saved['step'] >= steps:
        return process.say(f'{path} is finished ({steps} steps): nothing to do')
    people, labels = np.unique(task.faces.labels[task.rows], return_inverse=True)
    process.say(f'training {path} on {len(task.rows)} images of {len(people)} people, '
                f'{steps} steps')

    torch.manual_seed(batches.stream(task.seed, f'{task.section} weights'))
    net = make_net(cfg, task, resumed=saved is not None)
    head, divided = class_layer(len(people), c)
    net, head = net.to(device, memory_format=torch.channels_last), head.to(device)
    task.faces.images.keep(task.rows, device)
    store = batches.Store(task.faces.select(task.rows), device)
    training = Training(
        cfg, path, task.stage, {'net': net, 'head': head}, make_optimizer(net, head, c, device),
        steps, c.batch, ['loss', 'accuracy'], device, saved)
    if cfg.run.compile:
        process.say('compiling the net: the first step takes a minute')
        net.compile()
    statistics = NormStatistics(net)
    targets = torch.as_tensor(labels, device=device)
    parallel_net = process.parallel(net)
    parallel_head = head if divided else process.parallel(head)

    remaining = range(training.step, steps)
    for step, epoch, batch, images in batches.in_order(order, store, remaining, own):
        rows = batches.to_device(torch.from_numpy(batch[own]), device)
        flip, random = random_numbers(task, epoch, rows)
        images, target = batches.flipped(images, flip), targets[rows]
        parts = list(zip(images.split(size), target.split(size), random.split(size)))
        current_margin = margin(step, steps, c)
        losses = torch.zeros(2, device=device)         # loss, accuracy
        if c.sample_rate < 1:
            centres = batches.stream(task.seed, f'{task.section} centres', step)
            head.sample(centres, labels[batch])
        statistics.begin()
        for number, (x, y, u) in enumerate(parts):
            # Gradients are averaged over processes with the last part, when they are complete
            process.average_next(number == len(parts) - 1, parallel_net, parallel_head)
            x = embed.for_recogniser(x, net)
            if c.augment:
                x = augmented(x, u, c.augment)
            with process.autocast(device, cfg.run.precision):
                z = parallel_net(x)
            loss, accuracy = classify(parallel_head, z, y, current_margin)
            training.backward(loss / len(parts))
            statistics.collect()
            losses += torch.stack([loss.detach(), accuracy]) / len(parts)
        statistics.finish(len(parts))
        training.update(losses, learning_rate(step, steps, order.steps_per_epoch, c))

        if training.log_due():
            training.write_log(margin=current_margin)
        if training.save_due():
            training.save(made_from=made_from, made_by=code)
    training.end()


def train_public(cfg, role, device):
    """The teacher or judge of every fold, on public identities."""
    c = getattr(cfg, role)
    if c.checkpoint:
        return process.say(f'{role}.checkpoint = {c.checkpoint} is used: nothing to train')
    # What fr sets for all recognisers; init is the student's alone
    shared = [key for key in vars(cfg.fr) if not hasattr(c, key) and key != 'init']
    fixed = [role, *(f'fr.{key}' for key in shared)]
    for fold in split(cfg):
        path = Path(cfg.run.folder, f'fold{fold.k}', f'{role}.pt')
        task = Recogniser(f'{role}/fold{fold.k}', path, fold.public, fold.train, role, c.seed,
                          fixed)
        with process.only_writer(path):
            train(cfg, task, device)


def train_student(variant, device):
    """The recogniser of a release."""
    cfg = variant.cfg
    released = faces.load_release(variant)
    task = Recogniser(f'student/{variant.label}'.rstrip('/'), variant.student, released,
                      np.arange(len(released)), 'fr', cfg.run.seed, ['fr', 'run.seed'])
    train(cfg, task, device)


def main(cfg, device, compare):
    if cfg.stage != 'student':
        return train_public(cfg, cfg.stage, device)
    for variant in variants(cfg, compare):
        with process.only_writer(variant.student):
            train_student(variant, device)


if __name__ == '__main__':
    launch(main)

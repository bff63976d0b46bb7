"""Stages 0 and 3 of FaceMAE: train a face recogniser, IResNet with ArcFace or CosFace.

    python train_fr.py stage=teacher     # on public faces; judge: the same with other seed, depth
    python train_fr.py                   # the student, on the released faces alone
    torchrun --nproc_per_node=8 train_fr.py --config configs/casia.yaml
    python train_fr.py release=PATH run.folder=runs/mine     # on anybody's records or folders

Reads   teacher, judge: data.root (or data.public); student: <run>/<row>/reconstructed
Writes  <run>/fold<k>/teacher.pt, <run>/fold<k>/judge.pt, <run>/<row>/fr.pt, <run>/log.jsonl

BatchNorm sees fr.norm_batch images at a time and its running statistics take one step for the
mean of all of them, so that a run does not depend on the number of processes. The same command
continues an interrupted run exactly.
"""
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import batches
import checkpoint
import data
import embed
import models
import runtime
from config import as_dict, rows
from records import InputError

FIXED = ['data.size', 'run.precision']           # premises of a checkpoint; callers add their own


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
    """The margin grows linearly between the two shares of training in fr.margin_warmup.

    Small recognisers do not converge when the full margin acts from the first step.
    """
    begin, end = cfg.margin_warmup
    done = step / total
    if done >= end:
        return cfg.margin
    return cfg.margin * max(0.0, (done - begin) / (end - begin)) if end > begin else 0.0


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
    inside = ((line - box[0]).abs() < 0.5 * box[2]) & ((line[:, None] - box[1]).abs()
                                                       < 0.5 * box[3].abs())
    return x.masked_fill(inside, 0.0)


class NormStatistics:
    """One step of BatchNorm's running statistics for a batch that is seen in several parts."""

    def __init__(self, net):
        self.buffers = [b for name, b in net.named_buffers() if b.is_floating_point()]

    def begin(self):
        self.old = [b.clone() for b in self.buffers]
        self.sums = [torch.zeros_like(b) for b in self.buffers]

    def collect(self):
        """After a part's forward pass: keep what it made of the statistics, and go back."""
        torch._foreach_add_(self.sums, self.buffers)
        torch._foreach_copy_(self.buffers, self.old)

    def finish(self, parts):
        """Set the mean over the parts of all processes."""
        flat = runtime.mean(torch.cat([s.flatten() for s in self.sums]) / parts)
        for b, piece in zip(self.buffers, flat.split([b.numel() for b in self.buffers])):
            b.copy_(piece.view_as(b))


def train(cfg, path, faces, chosen, role, stage, fixed, device):
    """Train one recogniser on the images faces[chosen] and save it at `path`.

    A generator, which yields after each step. `role` says which recogniser: depth, width, epochs,
    seed; all else is in the config's section fr.
    """
    runtime.barrier()
    saved = checkpoint.load(path) if path.exists() else None
    digest = data.digest(faces, chosen)
    if saved:
        checkpoint.same_premises(saved, cfg, FIXED + fixed, path, digest)
    c, seed = cfg.fr, role.seed
    store = batches.Store(faces.images, chosen, device)
    labels = data.renumber(faces.labels[chosen])
    order = batches.Order(len(store), c.batch, seed)
    total = max(1, round(role.epochs * order.steps_per_epoch))
    if saved and saved['step'] >= total:
        return runtime.say(f'{path} is finished ({total} steps): nothing to do')
    mine = runtime.share(c.batch, 'fr.batch')
    own, part = mine.stop - mine.start, min(c.norm_batch, c.batch)
    if own % part or part < 2:
        raise InputError(f'fr.norm_batch = {part} does not divide the {own} images of a process: '
                         f'use fewer processes, or fr.norm_batch={own} in every run to compare')
    classes = int(labels.max()) + 1
    runtime.say(f'training {path} on {len(store)} images of {classes} people, {total} steps')

    torch.manual_seed(seed)
    try:
        net = models.iresnet(role.depth, role.width, cfg.data.size, c.dim)
    except ValueError as e:
        raise InputError(f'{stage}: {e}') from None
    head = models.MarginHead(c.dim, classes, c.loss, c.scale, c.margin_gradient).to(device)
    net = net.to(device, memory_format=torch.channels_last)
    parameters = [p for p in [*net.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, momentum=c.momentum, weight_decay=c.weight_decay,
                                fused=device.type == 'cuda')
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.run.precision == 'fp16')
    step, logged, sums = 0, 0, torch.zeros(2, device=device)
    if saved:
        embed.fill(net, saved['net'], path)
        embed.fill(head, saved['head'], path)
        optimizer.load_state_dict(saved['optimizer'])
        scaler.load_state_dict(saved['scaler'])
        step, logged, sums = saved['step'], saved['logged'], saved['sums'].to(device)
        runtime.say(f'continuing at step {step}')

    if cfg.run.compile:
        net.compile()
    labels = torch.as_tensor(labels, device=device)
    statistics = NormStatistics(net)
    log = runtime.Log(cfg.run.folder, stage, total, step)
    stop, taken, saved_at = runtime.Stop(), 0, 0
    while step < total:
        chosen, epoch = order(step)
        numbers = torch.from_numpy(chosen[mine]).to(device)
        flip = batches.hashed(seed + 1, epoch, numbers, 1)[:, 0] > 0
        images, target = batches.flipped(store(numbers), flip), labels[numbers]
        statistics.begin()
        chances = batches.uniform(batches.hashed(seed + 2, epoch, numbers, 10))
        parts = list(zip(images.split(part), target.split(part), chances.split(part)))
        for x, y, chance in parts:
            x = embed.for_recogniser(x, net)
            if c.augment:
                x = augmented(x, chance, c.augment)
            with runtime.autocast(device, cfg.run.precision):
                z = net(x)
            logits = head(z, y, margin(step, total, c))
            loss = F.cross_entropy(logits, y)
            scaler.scale(loss / len(parts)).backward()
            statistics.collect()
            hits = (logits.detach().argmax(1) == y).float().mean()
            sums += torch.stack([loss.detach(), hits]) / len(parts)
        statistics.finish(len(parts))
        runtime.average_gradients(parameters)
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, total, order.steps_per_epoch, c)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step, taken = step + 1, taken + c.batch

        due = stop.checkpoint_due(step == total or
                                  log.seconds() - saved_at >= 60 * cfg.run.save_minutes)
        if step % cfg.run.log_every == 0 or step == total:
            loss, hits = (runtime.mean(sums) / (step - logged)).tolist()
            runtime.check_finite({'loss': loss}, step, path)
            log(step, taken, loss=loss, accuracy=hits, margin=margin(step - 1, total, c),
                lr=learning_rate(step - 1, total, order.steps_per_epoch, c))
            sums.zero_()
            logged = step
        if due:
            saved_at, sums = log.seconds(), runtime.mean(sums)
            runtime.check_finite({'loss': sums[0].item()}, step, path)
            checkpoint.save(path, {
                'net': net.state_dict(), 'head': head.state_dict(), 'step': step, 'steps': total,
                'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
                'logged': logged, 'sums': sums, 'images': digest, 'config': as_dict(cfg)})
        stop.leave()
        yield
    stop.end()


def train_public(cfg, stage, device):
    """Teacher or judge of every fold, on public identities."""
    role = getattr(cfg, stage)
    if role.checkpoint:
        return runtime.say(f'{stage}.checkpoint = {role.checkpoint} is used: nothing to train')
    fixed = [stage, *(f'fr.{key}' for key in vars(cfg.fr) if not hasattr(role, key))]
    for fold in data.split(cfg):
        for _ in train(cfg, Path(cfg.run.folder) / f'fold{fold.k}' / f'{stage}.pt', fold.data,
                       fold.train, role, f'{stage}/fold{fold.k}', fixed, device):
            pass


def train_student(row, device):
    """The recogniser of a release."""
    cfg = row.cfg
    released = data.load_release(row)
    if not cfg.release:
        data.split(cfg)                 # refuses people or images that are public and private
    stage = f'student/{row.folder.relative_to(cfg.run.folder)}'.removesuffix('/.')
    role = SimpleNamespace(**vars(cfg.fr), seed=cfg.run.seed)
    for _ in train(cfg, row.folder / 'fr.pt', released, np.arange(len(released.labels)), role,
                   stage, ['fr', 'run.seed'], device):
        pass


def main(cfg, device, compare):
    if cfg.stage != 'student':
        return train_public(cfg, cfg.stage, device)
    for row in rows(cfg, compare):
        train_student(row, device)


if __name__ == '__main__':
    runtime.launch(main, __doc__, 'train the students of all rows of compare')

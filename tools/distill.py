# SPDX-License-Identifier: MIT
"""A teacher that sees like another recogniser, learnt from public faces alone.

    python tools/distill.py configs/lfw.yaml teacher.checkpoint=dlib run.folder=runs/distilled
    python tools/distill.py configs/casia.yaml teacher.checkpoint=w600k_r50.onnx run.folder=runs/r50

Reads   data.root (or data.public), and the recogniser that teacher.checkpoint names
Writes  <run>/fold<k>/teacher.pt, an IResNet of teacher.depth and teacher.width with the embedding
        length of the other, which stages 1 and 4 then take as their teacher

A published recogniser can only look, but FaceMAE needs a teacher that passes a gradient on. The
student net minimises 1 - cosine to the other's embeddings, from which their mean is taken, as
recognisers of a few thousand people share one common direction. Whom the other learnt from cannot
be checked.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F

import models
from facekit import batches, embed, files, run
from facekit.errors import InputError
from facekit.split import split
from facekit.training import Training, load_unfinished

FIXED = ['teacher', 'data.size', 'run.precision']     # refuse to resume if one changed
RATE, DECAY, BATCH = 2e-3, 0.05, 64


def targets(other, store, cfg):
    """The other's unit embeddings of a Store's images, centred, float32 (N, d)."""
    parts = torch.arange(len(store)).split(cfg.evaluate.batch)
    z = torch.cat([embed.embed_batch(other, store(part), cfg.run.precision) for part in parts])
    z = F.normalize(z)
    return F.normalize(z - z.mean(0))


def train(cfg, fold, device):
    """The teacher of a Fold, from the people who train its recognisers and MAE."""
    path = Path(cfg.run.folder, f'fold{fold.k}', 'teacher.pt')
    store = batches.Store(fold.public.select(fold.mae), device)
    order = batches.Order(len(store), BATCH, cfg.teacher.seed, 'the batch of 64')
    steps = round(cfg.teacher.epochs * order.steps_per_epoch)
    premises = {'set of images': fold.public.digest(fold.mae)}
    saved = load_unfinished(path, cfg, FIXED, premises, ['net'])
    if saved and saved['step'] >= steps:
        return run.say(f'{path} is finished ({steps} steps): nothing to do')
    run.say(f'training {path} on {len(store)} public images, {steps} steps')
    other = embed.recogniser(cfg.teacher.checkpoint, device,
                             onnx_pixels=cfg.evaluate.onnx_pixels)
    wanted = targets(other, store, cfg)
    torch.manual_seed(cfg.teacher.seed)
    net = models.iresnet(cfg.teacher.depth, cfg.teacher.width, cfg.data.size, wanted.shape[1])
    net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=DECAY)
    training = Training(cfg, path, f'distill/fold{fold.k}', {'net': net}, optimizer, steps, BATCH,
                        ('distance',), device, {'premises': premises}, saved)
    while training.step < steps:
        batch, epoch = order(training.step)
        rows = torch.from_numpy(batch).to(device)
        flip = batches.hashed(batches.stream(cfg.teacher.seed, 'flips', epoch), rows, 1)[:, 0] > 0
        x = embed.for_recogniser(batches.flipped(store(rows), flip), net)
        with run.autocast(device, cfg.run.precision):
            z = net(x)
        loss = 1 - F.cosine_similarity(z.float(), wanted[rows]).mean()
        training.backward(loss)
        training.update(loss.detach()[None], RATE * (1 - training.step / steps))
        if training.log_due():
            training.write_log()
        if training.save_due():
            training.save()
    training.end()


def main(cfg, device, compare):
    if not cfg.teacher.checkpoint:
        raise InputError('teacher.checkpoint is empty: name the recogniser to learn from, an '
                         '.onnx file, an insightface backbone, or dlib')
    if run.world() > 1:
        raise InputError('tools/distill.py works in one process: start it with python')
    for fold in split(cfg):
        with files.only_writer(Path(cfg.run.folder, f'fold{fold.k}', 'teacher.pt')):
            train(cfg, fold, device)


if __name__ == '__main__':
    run.launch(main, lambda cfg, compare: split(cfg))

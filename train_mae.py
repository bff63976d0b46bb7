# SPDX-License-Identifier: MIT
"""Stage 1 of FaceMAE: train a masked autoencoder on public faces with instance relation matching.

On one device, GPU or CPU; without a config it takes toy faces, which it draws:
$ python train_mae.py
$ python train_mae.py --config configs/casia.yaml
$ python train_mae.py --config configs/casia.yaml irm.weight=0 mae.name=mae_mse   # plain MAE

On the 8 GPUs of one machine:
$ torchrun --nproc_per_node=8 train_mae.py --config configs/casia.yaml

On several machines: docs/casia.md. Time: the toy's 936 steps took 165 to 200 s with one thread of
an AMD EPYC. Not yet run on a GPU; docs/scale.md has projections.

Reads   data.root (or data.public), <run>/fold<k>/teacher.pt
Writes  <run>/fold<k>/mae.pt, <run>/log/train_mae/

The loss is mae.mse_weight * (squared error, see mae.mse_on) + irm.weight * IRM, where IRM asks
that the frozen teacher sees the same relations among the reconstructions of a batch as among its
originals (FaceMAE, arXiv 2205.11090). The same command continues an interrupted run exactly.
"""
import facekit.base.start  # noqa: F401 (first: says what is not installed)

import math

import torch

import models
from facekit.base import process
from facekit.base.config import variants
from facekit.base.made_from import settings
from facekit.base.launch import command, launch, made_by
from facekit.data import batches
from facekit.data.images import to_float
from facekit.data.people import split
from facekit.nets import embed
from facekit.nets.published import refuse_published
from facekit.nets.weights import digest_of_weights, load_checkpoint, load_weights, recogniser
from facekit.nets.training import Training, load_unfinished
from facekit.privacy import protect
from facekit.privacy.protect import FaceMAE
from irm import gather_rows, irm_loss, relation_correlation

# Refuse to resume if one of these changed
FIXED = ['mae', 'irm', 'teacher', 'data.size', 'run.seed', 'run.precision',
         'reconstruct.paste_visible']


def learning_rate(step, total, cfg):
    """Linear warm-up, then half a cosine down to zero: a pure function of the step."""
    peak = cfg.lr * cfg.batch / 256
    warm = min(cfg.warmup_epochs / cfg.epochs, 1.0) * total
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def mean_face(store):
    """Mean of at most a million images of a Store and their mirrors: float32 (3, H, W), 0..1."""
    some = torch.arange(0, len(store), 1 + len(store) // 2 ** 20)
    total = sum(part.sum(0, dtype=torch.float64) for part in store.ahead(some.split(4096)))
    mean = (total / len(some) / 255).permute(2, 0, 1).float()
    return (mean + mean.flip(2)) / 2


class Objective:
    """The two losses of a batch, with everything they need that is not trained."""

    def __init__(self, cfg, mae, teacher, store):
        """mae: FaceMAE; teacher: frozen recogniser or None; store: of the images to come."""
        self.cfg, self.mae, self.teacher = cfg, mae, teacher
        self.model = process.parallel(mae.model)
        self.cached_originals = embed_originals(cfg, teacher, store)
        if cfg.run.compile and store.device.type == 'cuda':   # slower than without on a CPU
            process.say('compiling the nets: the first step takes a minute')
            mae.model.compile()
            if teacher:
                teacher.compile()

    def originals(self, images, rows, flip):
        """The teacher's embeddings (B, d) of images (B, H, W, 3): those in `rows` of the Store,
        mirrored where `flip`."""
        if self.cached_originals is not None:
            return self.cached_originals[flip.long(), rows]
        return torch.cat([embed.embed_batch(self.teacher, part, self.cfg.run.precision)
                          for part in images.split(self.cfg.mae.micro_batch)])

    def forward(self, images, noise, relate):
        """uint8 (B, H, W, 3) and noise (B, L) -> squared error, and, if `relate`, the teacher's
        embeddings of the reconstructions (B, d)."""
        c, patchify = self.cfg.mae, self.mae.model.patchify
        x = self.mae.normalise(to_float(images))
        with process.autocast(x.device, self.cfg.run.precision):
            pred, mask = self.model(x, noise, c.mask_ratio)
            counted = mask if c.mse_on == 'hidden' else torch.ones_like(mask)
            mse = models.masked_mse(pred, patchify(x), counted)
            if not relate:
                return mse, None
            if self.cfg.reconstruct.paste_visible:
                pred = torch.where(mask[:, :, None] > 0, pred, patchify(x))
            reconstructed = self.mae.to_pixels(pred)
            return mse, self.teacher(embed.for_recogniser(reconstructed, self.teacher)).float()

    def backward(self, training, images, noise, originals):
        """Accumulate the gradient of a batch's loss, one micro-batch after another.

        originals: the teacher's embeddings of the images (B, d), or None while IRM does not act.
        Returns the losses (squared error, IRM), a tensor, and the embeddings of the
        reconstructions (B, d) or None.

        IRM relates all instances of the global batch, but memory holds the graph of a single
        micro-batch. Where there are several, all are embedded first without a graph, and IRM's
        gradient with respect to their embeddings goes back through one micro-batch at a time.
        """
        c, relate = self.cfg, originals is not None
        size = c.mae.micro_batch
        parts = list(zip(images.split(size), noise.split(size)))
        mse = irm = torch.zeros((), device=images.device)
        z = None
        if relate and len(parts) > 1:
            with torch.no_grad():
                z = torch.cat([self.forward(x, n, relate)[1] for x, n in parts])
            z.requires_grad_()
            irm = irm_loss(originals, z, c.irm.relations)
            z_gradients = torch.autograd.grad(irm, z)[0].split(size)

        for number, (x, n) in enumerate(parts):
            # Gradients are averaged over processes with the last part, when they are complete
            process.average_next(number == len(parts) - 1, self.model)
            part_mse, part_z = self.forward(x, n, relate)
            share = len(x) / len(images)
            loss = c.mae.mse_weight * part_mse * share
            if relate:
                if len(parts) > 1:
                    relation = (part_z * z_gradients[number]).sum()
                else:                        # the part is the batch: its graph is there already
                    z = part_z
                    relation = irm = irm_loss(originals, z, c.irm.relations)
                loss = loss + c.irm.weight * relation
            training.backward(loss)
            mse = mse + part_mse.detach() * share
        return torch.stack([mse, irm.detach()]), z


def load_teacher(cfg, fold, device):
    """The frozen recogniser phi and the digest of its weights; None twice without relations."""
    if not cfg.irm.weight:
        return None, None
    path = cfg.teacher.checkpoint or f'{cfg.run.folder}/fold{fold.k}/teacher.pt'
    refuse_published(path, 'the teacher shapes the MAE')
    net = recogniser(path, device, command('train_fr.py', 'stage=teacher'),
                     fold=None if cfg.teacher.checkpoint else fold)
    return models.folded(net), digest_of_weights(net.state_dict())


def embed_originals(cfg, teacher, store):
    """The teacher's embeddings of all originals and their mirror images, float32 (2, N, d), all
    that will be asked for; None where few are, or memory is short."""
    if not cfg.irm.weight or cfg.mae.epochs - cfg.irm.warmup_epochs <= 2:
        return None
    needed = 2 * len(store) * teacher.fc.out_features * 4
    if process.broadcast(needed > process.free_memory(store.device) / 4):
        return None
    process.say(f'the teacher embeds {len(store)} originals and their mirror images')
    return embed.embed_all(teacher, store, cfg.mae.micro_batch, cfg.run.precision)


def make_mae(cfg, store, device, resumed):
    """The FaceMAE to train on a Store's images, with new weights or those of mae.init."""
    torch.manual_seed(cfg.run.seed)
    model = protect.build_mae(cfg.mae, cfg.data.size)
    if cfg.mae.init and not resumed:
        load_weights(model, load_checkpoint(cfg.mae.init), cfg.mae.init)
    mean = mean_face(store) if cfg.mae.mean_face else torch.full((3, 1, 1), 0.5)
    return FaceMAE(model.to(device), mean.to(device), protect.STD)


def make_optimizer(model, cfg, device):
    """AdamW without weight decay on biases, norms and tokens (MAE, arXiv 2111.06377, table 8)."""
    matrices, others = [], []
    for p in model.parameters():
        if p.ndim > 1 and p.shape[0] > 1:              # a token is (1, 1, D)
            matrices.append(p)
        else:
            others.append(p)
    return torch.optim.AdamW([{'params': matrices, 'weight_decay': cfg.mae.weight_decay},
                              {'params': others, 'weight_decay': 0.0}],
                             betas=(0.9, 0.95), fused=device.type == 'cuda')


def train(variant, fold, device):
    """Train the masked autoencoder of a fold, or continue where an interrupted run stopped."""
    cfg, c, path = variant.cfg, variant.cfg.mae, variant.mae(fold.k)
    own = process.own_share(c.batch, 'mae.batch')          # this process's slice of a global batch
    protect.visible_count(cfg.data.size, c.patch, c.mask_ratio)       # refuses a wrong ratio
    order = batches.Order(len(fold.mae), c.batch, cfg.run.seed, 'mae.batch')
    steps = order.steps(c.epochs)
    teacher, teacher_digest = load_teacher(cfg, fold, device)
    made_from = settings(cfg, FIXED) | {'set of images': fold.public.digest(fold.mae)}
    if teacher:
        made_from['teacher'] = teacher_digest
    code = made_by('train_mae.py')
    saved = load_unfinished(path, made_from, code, ['model', 'mean', 'std'])
    if saved and saved['step'] >= steps:
        return process.say(f'{path} is finished ({steps} steps): nothing to do')
    process.say(f'training {path} on {len(fold.mae)} public images, {steps} steps')

    fold.public.images.keep(fold.mae, device)
    store = batches.Store(fold.public.select(fold.mae), device)
    mae = make_mae(cfg, store, device, resumed=saved is not None)
    objective = Objective(cfg, mae, teacher, store)
    training = Training(
        cfg, path, f'train_mae/fold{fold.k}/{path.stem}', {'model': mae.model},
        make_optimizer(mae.model, cfg, device), steps, c.batch, ['mse', 'irm'], device, saved)
    relate_from = round(cfg.irm.warmup_epochs * order.steps_per_epoch)

    remaining = range(training.step, steps)
    for step, epoch, batch, images in batches.in_order(order, store, remaining, own):
        rows = batches.to_device(torch.from_numpy(batch[own]), device)
        flip = batches.hashed(batches.stream(cfg.run.seed, 'flips', epoch), rows, 1)[:, 0] > 0
        seeds = batches.image_seeds(batches.stream(cfg.run.seed, 'masks', epoch), rows)
        noise = protect.patch_noise(seeds, cfg)
        images = batches.flipped(images, flip)
        originals = None                               # their embeddings, once IRM acts
        if cfg.irm.weight and step >= relate_from:
            originals = objective.originals(images, rows, flip)
        losses, z = objective.backward(training, images, noise, originals)
        training.update(losses, learning_rate(step, steps, c))

        if training.log_due():
            write_log(training, originals, z, cfg.irm.relations)
        if training.save_due():
            training.save(mean=mae.mean.cpu(), std=mae.std, made_from=made_from, made_by=code)
    training.end()


def write_log(training, originals, z, kind):
    """A log line, with the correlation of the relations of the last batch's embeddings, originals
    and z (B, d), if they act."""
    if originals is None:
        return training.write_log(inactive=['irm'], relations=None)
    correlation = relation_correlation(gather_rows(originals), gather_rows(z.detach()), kind)
    training.write_log(relations=correlation.nan_to_num().item())


def main(cfg, device, compare):
    folds = split(cfg)
    for variant in variants(cfg, compare):
        if variant.cfg.reconstruct.method != 'facemae':
            continue                                   # other protections need no model
        for fold in folds:
            with process.only_writer(variant.mae(fold.k)):
                train(variant, fold, device)


if __name__ == '__main__':
    launch(main)

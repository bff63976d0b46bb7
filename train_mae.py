# SPDX-License-Identifier: MIT
"""Stage 1 of FaceMAE: train a masked autoencoder on public faces with instance relation matching.

    python train_mae.py                                            # toy faces, any machine
    torchrun --nproc_per_node=8 train_mae.py --config configs/casia.yaml
    python train_mae.py --config configs/casia.yaml irm.weight=0 mae.name=mae_mse   # plain MAE

Reads   data.root (or data.public), <run>/fold<k>/teacher.pt
Writes  <run>/fold<k>/mae.pt, <run>/log/train_mae/, <run>/figures/mae_fold<k>.png

The loss is mae.mse_weight * (squared error, see mae.mse_on) + irm.weight * IRM, where IRM asks
that the frozen teacher sees the same relations among the reconstructions of a batch as among its
originals (FaceMAE, arXiv 2205.11090). The same command continues an interrupted run exactly.
"""
import facekit.start  # noqa: F401 (first: says what is not installed)

import math
from dataclasses import dataclass

import torch

import models
from facekit import batches, embed, files, plots, protect, run
from facekit.check import check_experiment
from facekit.config import variants
from facekit.images import to_float
from facekit.protect import FaceMAE
from facekit.published import refuse_published
from facekit.split import split
from facekit.training import Training, load_unfinished
from irm import gather_rows, irm_loss, relation_correlation, relations

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
    """Mean of a Store's images, at most a million of them, and their mirrors: float32 (3, H, W)
    in 0..1."""
    some = torch.arange(0, len(store), 1 + len(store) // 2 ** 20)
    total = sum(part.sum(0, dtype=torch.float64) for part in store.ahead(some.split(4096)))
    mean = (total / len(some) / 255).permute(2, 0, 1).float()
    return (mean + mean.flip(2)) / 2


# ---------------------------------------------------------------------------- the losses

class Objective:
    """The two losses of a batch, with everything they need that is not trained."""

    def __init__(self, cfg, mae, teacher):
        """mae: FaceMAE; teacher: frozen recogniser, or None where irm.weight = 0."""
        self.cfg, self.mae, self.teacher = cfg, mae, teacher
        self.model = run.parallel(mae.model)

    def forward(self, images, noise, relate):
        """uint8 (B, H, W, 3) and noise (B, L) -> squared error, and, if `relate`, the teacher's
        embeddings of the reconstructions (B, d)."""
        c, patchify = self.cfg.mae, self.mae.model.patchify
        x = self.mae.normalise(to_float(images))
        with run.autocast(x.device, self.cfg.run.precision):
            pred, mask = self.model(x, noise, c.mask_ratio)
            counted = mask if c.mse_on == 'hidden' else torch.ones_like(mask)
            mse = models.masked_mse(pred, patchify(x), counted)
            if not relate:
                return mse, None
            if self.cfg.reconstruct.paste_visible:
                pred = torch.where(mask[:, :, None] > 0, pred, patchify(x))
            reconstructed = self.mae.to_pixels(pred)
            return mse, self.teacher(embed.for_recogniser(reconstructed, self.teacher)).float()

    def embeddings(self, parts):
        """The teacher's embeddings (B, d) of the reconstructions of (images, noise) parts."""
        with torch.no_grad():
            return torch.cat([self.forward(*part, relate=True)[1] for part in parts])

    def backward(self, images, noise, originals, backward):
        """Accumulate the gradient of the whole batch, micro-batch by micro-batch.

        IRM (left out where `originals` is None) relates all instances of the global batch. Where
        they are more than a micro-batch, the embeddings are made first without a graph; IRM's
        gradient with respect to them is then carried through one micro-batch at a time. Same
        gradient, memory of one micro-batch. `backward` takes a loss.
        Returns the losses (squared error, IRM), a tensor, and the reconstructions' embeddings.
        """
        c, relate = self.cfg.irm, originals is not None
        parts = list(zip(images.split(self.cfg.mae.micro_batch),
                         noise.split(self.cfg.mae.micro_batch)))
        irm, z, z_gradient = torch.zeros((), device=images.device), None, None
        if relate and len(parts) > 1:
            z = self.embeddings(parts).requires_grad_()
            irm = irm_loss(originals, z, c.relations)
            z_gradient = torch.autograd.grad(irm, z)[0].split(self.cfg.mae.micro_batch)
        mse_sum = 0
        for number, part in enumerate(parts):
            run.average_next(number == len(parts) - 1, self.model)
            mse, z_part = self.forward(*part, relate)
            share = len(part[0]) / len(images)
            loss = self.cfg.mae.mse_weight * mse * share
            if z_gradient:
                loss = loss + c.weight * (z_part * z_gradient[number]).sum()
            elif relate:
                z = z_part
                irm = irm_loss(originals, z, c.relations)
                loss = loss + c.weight * irm
            backward(loss)
            mse_sum = mse_sum + mse.detach() * share
        return torch.stack([mse_sum, irm.detach()]), z


@dataclass
class ValidationBatch:
    """Images of people who are in no training, on which the log watches the relations."""
    images: torch.Tensor      # uint8 (B, H, W, 3)
    noise: torch.Tensor       # int64 (B, L), fixed
    originals: torch.Tensor   # float32 (B, d), the teacher's embeddings

    @classmethod
    def of(cls, fold, teacher, cfg, device):
        """That of a Fold, or None if nobody was kept from training: its first 256 images, not a
        sample, so that people have several."""
        if not len(fold.validation):
            return None
        images = torch.from_numpy(fold.public.select(fold.validation[:256]).pixels()).to(device)
        seeds = batches.image_seeds(batches.stream(cfg.run.seed, 'validation masks'),
                                    torch.arange(len(images), device=device))
        noise = protect.patch_noise(seeds, cfg)
        return cls(images, noise, embed.embed_batch(teacher, images, cfg.run.precision))

    @torch.no_grad()
    def figures(self, objective):
        """For the log: IRM; what it would be if the reconstructions were unrelated, where
        IRM alone tends to stall; correlation of the relations; mean cosine of a
        reconstruction with its original."""
        size, kind = objective.cfg.mae.micro_batch, objective.cfg.irm.relations
        kind = 'cosine' if kind == 'direct' else kind
        z = objective.embeddings(zip(self.images.split(size), self.noise.split(size)))
        different = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        r, s = relations(self.originals, kind)[different], relations(z, kind)[different]
        return {'validation_irm': (r - s).square().mean().item(),
                'unrelated_irm': r.square().mean().item() + 1 / z.shape[1],
                'validation_relations': relation_correlation(self.originals, z, kind).item(),
                'validation_cosine': torch.cosine_similarity(self.originals, z).mean().item()}


# -------------------------------------------------------------------------- the training

def load_teacher(cfg, fold, device):
    """The frozen recogniser phi with its BatchNorms folded and the digest of its weights, or None
    and None if nothing asks for it."""
    if not cfg.irm.weight and not len(fold.validation):
        return None, None
    path = cfg.teacher.checkpoint or f'{cfg.run.folder}/fold{fold.k}/teacher.pt'
    refuse_published(path, 'the teacher shapes the MAE')
    net = embed.recogniser(path, device, run.command('train_fr.py', 'stage=teacher'),
                           fold=None if cfg.teacher.checkpoint else fold)
    return models.folded(net), files.digest_of_weights(net.state_dict())


def embed_originals(cfg, teacher, store):
    """The teacher's embeddings of all originals and their mirror images, float32 (2, N, d), or
    None where few are asked for or they would take a quarter of the free memory.

    The only augmentation is a flip, so that two embeddings of each image are all there are.
    """
    needed = 2 * len(store) * teacher.fc.out_features * 4
    if (not cfg.irm.weight or cfg.mae.epochs - cfg.irm.warmup_epochs <= 2
            or run.broadcast(needed > run.free_memory(store.device) / 4)):
        return None
    return embed.embed_all(teacher, store, cfg.mae.micro_batch, cfg.run.precision)


def make_optimizer(model, cfg, device):
    """AdamW without weight decay on biases, norms and tokens (MAE, arXiv 2111.06377, table 8)."""
    decay = [p for p in model.parameters() if p.ndim > 1 and p.shape[0] > 1]
    rest = [p for p in model.parameters() if not (p.ndim > 1 and p.shape[0] > 1)]
    return torch.optim.AdamW([{'params': decay, 'weight_decay': cfg.mae.weight_decay},
                              {'params': rest, 'weight_decay': 0.0}],
                             betas=(0.9, 0.95), fused=device.type == 'cuda')


def save_preview(mae, images, noise, cfg, path):
    """Picture of originals, their visible patches, and what the model makes of them."""
    x, ratio = to_float(images), cfg.mae.mask_ratio
    with torch.no_grad():
        rebuilt = mae.reconstruct(x, noise, ratio, cfg)
    visible = protect.greyed(x, models.random_masking(noise, ratio)[2])
    plots.save_grid({'original': x, 'visible': visible, 'rebuilt': rebuilt}, path)


def train(variant, fold, device):
    """Train one masked autoencoder; a generator, which yields after each step, so that
    tools/bench.py can time the very steps."""
    cfg, path, c = variant.cfg, variant.mae(fold.k), variant.cfg.mae
    share = run.own_share(c.batch, 'mae.batch')
    protect.visible_count(cfg.data.size, c.patch, c.mask_ratio)
    order = batches.Order(len(fold.mae), c.batch, cfg.run.seed, 'mae.batch',
                          fold.public.labels[fold.mae], cfg.irm.images_per_identity)
    steps = max(1, round(c.epochs * order.steps_per_epoch))
    teacher, teacher_digest = load_teacher(cfg, fold, device)
    premises = {'set of images': fold.public.digest(fold.mae)}
    if teacher:
        premises['teacher'] = teacher_digest
    saved = load_unfinished(path, cfg, FIXED, premises, ['model', 'mean', 'std'])
    if saved and saved['step'] >= steps:
        return run.say(f'{path} is finished ({steps} steps): nothing to do')
    run.say(f'training {path} on {len(fold.mae)} public images, {steps} steps')

    torch.manual_seed(cfg.run.seed)
    model = protect.build_mae(c, cfg.data.size)
    if c.init and not saved:
        embed.load_weights(model, files.load_checkpoint(c.init), c.init)
    model.to(device)
    store = batches.Store(fold.public.select(fold.mae), device)
    mean = mean_face(store) if c.mean_face else torch.full((3, 1, 1), 0.5)
    objective = Objective(cfg, FaceMAE(model, mean.to(device), protect.STD), teacher)
    original_embeddings = embed_originals(cfg, teacher, store) if teacher else None
    if cfg.run.compile and device.type == 'cuda':      # on the CPU it makes these nets slower
        for net in filter(None, (model, teacher)):
            net.compile()
    validation = ValidationBatch.of(fold, teacher, cfg, device)
    training = Training(
        cfg, path, f'train_mae/fold{fold.k}/{path.stem}', {'model': model},
        make_optimizer(model, cfg, device), steps, c.batch, ('mse', 'irm'), device,
        {'mean': mean.cpu(), 'std': protect.STD, 'premises': premises}, saved)
    preview_every = max(1, round(c.preview_epochs * order.steps_per_epoch))
    relate_from = round(cfg.irm.warmup_epochs * order.steps_per_epoch)

    gathered = store.ahead(order(step)[0][share] for step in range(training.step, steps))
    while training.step < steps:
        batch, epoch = order(training.step)
        rows = batches.to_device(torch.from_numpy(batch[share]), device)
        flip = batches.hashed(batches.stream(cfg.run.seed, 'flips', epoch), rows, 1)[:, 0] > 0
        noise = protect.patch_noise(
            batches.image_seeds(batches.stream(cfg.run.seed, 'masks', epoch), rows), cfg)
        images, originals = batches.flipped(next(gathered), flip), None
        if cfg.irm.weight and training.step >= relate_from:
            originals = (original_embeddings[flip.long(), rows]
                         if original_embeddings is not None else
                         torch.cat([embed.embed_batch(teacher, part, cfg.run.precision)
                                    for part in images.split(c.micro_batch)]))
        losses, z = objective.backward(images, noise, originals, training.backward)
        training.update(losses, learning_rate(training.step, steps, c))

        if c.preview_epochs and training.step % preview_every == 0 and run.rank() == 0:
            save_preview(objective.mae, images[:8], noise[:8], cfg,
                         variant.run / 'figures' / f'{path.stem}_fold{fold.k}.png')
        if training.log_due():
            write_log(training, originals, z, validation, objective)
        if training.save_due():
            training.save()
        yield
    training.end()


def write_log(training, originals, z, validation, objective):
    """A log line, with the correlation of the relations of the last batch; originals and z are its
    embeddings (B, d), None while the relations do not act."""
    watched = validation.figures(objective) if validation else {}
    if originals is None:
        return training.write_log(['irm'], relations=None, **watched)
    correlation = relation_correlation(gather_rows(originals), gather_rows(z.detach()),
                                       objective.cfg.irm.relations)
    training.write_log(relations=correlation.nan_to_num().item(), **watched)


def main(cfg, device, compare):
    folds = split(cfg)
    for variant in variants(cfg, compare):
        if variant.cfg.reconstruct.method == 'facemae':
            for fold in folds:
                with files.only_writer(variant.mae(fold.k)):
                    for _ in train(variant, fold, device):
                        pass


if __name__ == '__main__':
    run.launch(main, check_experiment)

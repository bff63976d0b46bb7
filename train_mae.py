"""Stage 1 of FaceMAE: train a masked autoencoder on public faces with instance relation matching.

    python train_mae.py                                            # toy faces, any machine
    torchrun --nproc_per_node=8 train_mae.py --config configs/casia.yaml
    python train_mae.py --config configs/casia.yaml irm.weight=0 mae.name=mae_mse   # plain MAE

Reads   data.root (or data.public), <run>/fold<k>/teacher.pt
Writes  <run>/fold<k>/mae.pt, <run>/log.jsonl, <run>/figures/mae_fold<k>.png

The loss is mae.mse_weight * (squared error, see mae.mse_on) + irm.weight * IRM, where IRM asks
that the frozen teacher sees the same relations among the reconstructions of a batch as among its
originals (FaceMAE, arXiv 2205.11090). The same command continues an interrupted run exactly.
"""
import math
from pathlib import Path

import numpy as np
import torch

import batches
import checkpoint
import data
import embed
import models
import runtime
from config import as_dict, rows
from figures import save_grid
from irm import gather_rows, irm_loss, relation_correlation, relations
from records import InputError

# A checkpoint made under other values of these, or from other images, would be a lie
FIXED = ['mae', 'irm', 'teacher', 'data.size', 'run.seed', 'run.precision',
         'reconstruct.paste_visible']
STD = 0.25      # grey levels in 0..1 are divided by this; one number, so that hue is kept


def learning_rate(step, total, cfg):
    """Linear warm-up, then half a cosine down to zero: a pure function of the step."""
    peak = cfg.lr * cfg.batch / 256
    warm = min(cfg.warmup_epochs / cfg.epochs, 1.0) * total
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def mean_face(store):
    """Mean of the images and their mirrors, float32 (3, H, W) in 0..1."""
    total = sum(store(part).sum(0, dtype=torch.float64)
                for part in torch.arange(len(store)).split(4096))
    mean = (total / len(store) / 255).permute(2, 0, 1).float()
    return (mean + mean.flip(2)) / 2


def make_model(cfg, size):
    """The masked autoencoder of the config for images of `size` pixels."""
    c = cfg.mae
    try:
        return models.MAE(size, c.patch, c.dim, c.depth, c.heads, c.decoder_dim, c.decoder_depth,
                          c.decoder_heads)
    except ValueError as e:
        raise InputError(f'mae: {e}') from None


def visible_patches(size, patch, ratio):
    """Say how many patches a mask leaves, or why there is no such mask; returns L."""
    if size % patch:
        raise InputError(f'mae.patch = {patch} does not divide data.size = {size}: choose one '
                         'that does')
    patches = (size // patch) ** 2
    try:
        keep = models.random_masking(torch.zeros(1, patches), ratio)[0]
    except ValueError as e:
        raise InputError(str(e)) from None
    runtime.say(f'{keep.shape[1]} of {patches} patches visible')
    return patches


class Objective:
    """The two losses of a batch, with everything they need that is not trained."""

    def __init__(self, cfg, model, teacher, mean):
        self.cfg, self.model, self.teacher, self.mean = cfg, model, teacher, mean

    def forward(self, images, noise, relate):
        """uint8 (B, H, W, 3) and noise (B, L) -> squared error, and, if `relate`, the teacher's
        embeddings of the reconstructions (B, d)."""
        x = images.permute(0, 3, 1, 2).float().div(255).sub(self.mean).div(STD)
        with runtime.autocast(x.device, self.cfg.run.precision):
            pred, mask = self.model(x, noise, self.cfg.mae.mask_ratio)
            counted = mask if self.cfg.mae.mse_on == 'hidden' else torch.ones_like(mask)
            mse = models.masked_mse(pred, self.model.patchify(x), counted,
                                    self.cfg.mae.norm_pix_loss)
            if not relate:
                return mse, None
            if self.cfg.reconstruct.paste_visible:
                pred = torch.where(mask[:, :, None] > 0, pred, self.model.patchify(x))
            seen = self.model.unpatchify(pred.float()) * STD + self.mean
            return mse, self.teacher(embed.for_recogniser(seen, self.teacher)).float()

    def backward(self, images, noise, originals, scaler):
        """Accumulate the gradient of the whole batch, micro-batch by micro-batch.

        IRM (left out where `originals` is None) relates all instances of the global batch. Where
        they are more than a micro-batch, the embeddings are made first without a graph; IRM's
        gradient with respect to them is then carried through one micro-batch at a time. Same
        gradient, memory of one micro-batch.
        Returns the losses and the correlation of the relations as tensors.
        """
        size, relate = self.cfg.mae.micro_batch, originals is not None
        parts = list(zip(images.split(size), noise.split(size)))
        irm = agreement = images.new_zeros((), dtype=torch.float32)
        carried = None
        if relate and len(parts) > 1:
            with torch.no_grad():
                z = torch.cat([self.forward(*part, relate)[1] for part in parts])
            z.requires_grad_()
            irm = irm_loss(originals, z, self.cfg.irm.relations)
            carried = torch.autograd.grad(irm, z)[0].split(size)
        mse_sum = 0
        for number, part in enumerate(parts):
            mse, z_part = self.forward(*part, relate)
            loss = self.cfg.mae.mse_weight * mse * (len(part[0]) / len(images))
            if carried:
                loss = loss + self.cfg.irm.weight * (z_part * carried[number]).sum()
            elif relate:
                z = z_part
                irm = irm_loss(originals, z, self.cfg.irm.relations)
                loss = loss + self.cfg.irm.weight * irm
            scaler.scale(loss).backward()
            mse_sum = mse_sum + mse.detach() * (len(part[0]) / len(images))
        if relate:
            agreement = relation_correlation(gather_rows(originals), gather_rows(z.detach()))
        return torch.stack([mse_sum, irm.detach(), agreement.nan_to_num()])


@torch.no_grad()
def relations_held(objective, images, noise, originals):
    """How the relations of people in no training fare, float32 (4,): IRM; what it would be if the
    reconstructions were strangers to each other, where IRM alone tends to stall; correlation of
    the relations; mean cosine of a reconstruction with its original."""
    size = objective.cfg.mae.micro_batch
    z = torch.cat([objective.forward(*part, True)[1]
                   for part in zip(images.split(size), noise.split(size))])
    apart = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    r, s = relations(originals)[apart], relations(z)[apart]
    return torch.stack([(r - s).square().mean(), r.square().mean() + 1 / z.shape[1],
                        relation_correlation(originals, z),
                        torch.cosine_similarity(originals, z).mean()])


def preview(model, mean, images, noise, ratio, path):
    """Picture of originals, what the model sees, and what it makes of it."""
    with torch.no_grad():
        x = images.permute(0, 3, 1, 2).float() / 255
        pred, mask = model((x - mean) / STD, noise, ratio)
        made = model.unpatchify(pred.float()) * STD + mean
        grey = model.unpatchify(torch.where(mask[:, :, None] > 0, 0.5, model.patchify(x)))
    save_grid([x, grey, made], path)


def train(row, fold, device):
    """Train one masked autoencoder; a generator, which yields after each step."""
    cfg, path = row.cfg, row.mae(fold.k)
    runtime.barrier()                   # a row before this one may have made the same checkpoint
    saved = checkpoint.load(path) if path.exists() else None
    digest = data.digest(fold.data, fold.mae)
    if saved:
        checkpoint.same_premises(saved, cfg, FIXED, path, digest)
    store = batches.Store(fold.data.images, fold.mae, device)
    order = batches.Order(len(store), cfg.mae.batch, cfg.run.seed, fold.data.labels[fold.mae],
                       cfg.irm.images_per_identity)
    total = max(1, round(cfg.mae.epochs * order.steps_per_epoch))
    if saved and saved['step'] >= total:
        return runtime.say(f'{path} is finished ({total} steps): nothing to do')
    runtime.say(f'training {path} on {len(store)} public images, {total} steps')

    torch.manual_seed(cfg.run.seed)
    model = make_model(cfg, cfg.data.size)
    if cfg.mae.init and not saved:
        embed.fill(model, checkpoint.load(cfg.mae.init), cfg.mae.init)
    model.to(device)
    patches = visible_patches(cfg.data.size, cfg.mae.patch, cfg.mae.mask_ratio)
    flat = torch.full((3, 1, 1), 0.5, device=device)
    mean = mean_face(store).to(device) if cfg.mae.mean_face else flat

    teacher, known = None, None
    if cfg.irm.weight or len(fold.validation):
        source = cfg.teacher.checkpoint or Path(cfg.run.folder) / f'fold{fold.k}' / 'teacher.pt'
        teacher = models.folded(embed.recogniser(
            source, device, runtime.again('train_fr.py', 'stage=teacher')))
        # The only augmentation is a flip, so the originals need to be embedded only twice
        if cfg.irm.weight and cfg.mae.epochs - cfg.irm.warmup_epochs > 2:
            known = torch.stack(embed.embed_all(teacher, store, cfg.mae.micro_batch,
                                           cfg.run.precision))
    if cfg.run.compile and device.type == 'cuda':      # on the CPU it makes these nets slower
        for net in (model, teacher) if teacher else (model,):
            net.compile()
    objective = Objective(cfg, model, teacher, mean)

    held = None
    if len(fold.validation):            # the first, not a sample, so that people have several
        held = torch.from_numpy(np.array(fold.data.images[fold.validation[:256]])).to(device)
        held = held, batches.hashed(cfg.run.seed, 0, torch.arange(len(held), device=device),
                                    patches), embed.embed_batch(teacher, held, cfg.run.precision)

    decay = [p for p in model.parameters() if p.ndim > 1 and p.shape[0] > 1]
    rest = [p for p in model.parameters() if not (p.ndim > 1 and p.shape[0] > 1)]
    optimizer = torch.optim.AdamW([{'params': decay, 'weight_decay': cfg.mae.weight_decay},
                                   {'params': rest, 'weight_decay': 0.0}],
                                  betas=(0.9, 0.95), fused=device.type == 'cuda')
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.run.precision == 'fp16')
    step, logged, sums = 0, 0, torch.zeros(3, device=device)
    if saved:
        embed.fill(model, saved['model'], path)
        optimizer.load_state_dict(saved['optimizer'])
        scaler.load_state_dict(saved['scaler'])
        step, logged, sums = saved['step'], saved['logged'], saved['sums'].to(device)
        runtime.say(f'continuing at step {step}')

    stage = f'train_mae/fold{fold.k}/{path.stem}'
    log = runtime.Log(cfg.run.folder, stage, total, step)
    mine, stop, taken, saved_at = runtime.share(cfg.mae.batch, 'mae.batch'), runtime.Stop(), 0, 0
    previews = cfg.mae.preview_epochs * order.steps_per_epoch
    relate_from = round(cfg.irm.warmup_epochs * order.steps_per_epoch)
    while step < total:
        chosen, epoch = order(step)
        numbers = torch.from_numpy(chosen[mine]).to(device)
        flip = batches.hashed(cfg.run.seed + 1, epoch, numbers, 1)[:, 0] > 0
        noise = batches.hashed(cfg.run.seed, epoch, numbers, patches)
        images = batches.flipped(store(numbers), flip)
        originals = None
        if cfg.irm.weight and step >= relate_from:
            originals = known[flip.long(), numbers] if known is not None else torch.cat(
                [embed.embed_batch(teacher, part, cfg.run.precision)
                 for part in images.split(cfg.mae.micro_batch)])
        sums += objective.backward(images, noise, originals, scaler)
        runtime.average_gradients(model.parameters())
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, total, cfg.mae)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step, taken = step + 1, taken + cfg.mae.batch

        if previews and step % max(1, round(previews)) == 0 and runtime.rank() == 0:
            preview(model, mean, images[:8], noise[:8], cfg.mae.mask_ratio,
                    Path(cfg.run.folder) / 'figures' / f'{path.stem}_fold{fold.k}.png')
        due = stop.checkpoint_due(step == total or
                                  log.seconds() - saved_at >= 60 * cfg.run.save_minutes)
        if step % cfg.run.log_every == 0 or step == total:
            # The first look at the device since the last line: all above runs unsynchronised
            mse, irm, agreement = (runtime.mean(sums) / (step - logged)).tolist()
            runtime.check_finite({'mse': mse, 'irm': irm}, step, path)
            names = ('held_irm', 'held_strangers', 'held_relations', 'held_cosine')
            log(step, taken, mse=mse, irm=irm, relations=agreement,
                lr=learning_rate(step - 1, total, cfg.mae), **dict(zip(names, relations_held(
                    objective, *held).tolist() if held else ())))
            sums.zero_()
            logged = step
        if due:
            saved_at, sums = log.seconds(), runtime.mean(sums)
            runtime.check_finite({'mse + irm': sums[:2].sum().item()}, step, path)
            checkpoint.save(path, {
                'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
                'scaler': scaler.state_dict(), 'step': step, 'steps': total, 'logged': logged,
                'sums': sums, 'mean': mean.cpu(), 'std': STD, 'images': digest,
                'config': as_dict(cfg)})
        stop.leave()
        yield
    stop.end()


def main(cfg, device, compare):
    folds = data.split(cfg)
    for row in rows(cfg, compare):
        if row.cfg.reconstruct.method == 'facemae':
            for fold in folds:
                for _ in train(row, fold, device):
                    pass


if __name__ == '__main__':
    runtime.launch(main, __doc__, 'train the variants of all rows of compare')

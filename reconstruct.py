# SPDX-License-Identifier: MIT
"""Stage 2 of FaceMAE: turn the private faces into the set that is released.

    python reconstruct.py
    torchrun --nproc_per_node=8 reconstruct.py --config configs/casia.yaml
    python reconstruct.py reconstruct.method=pixelate run.folder=runs/pixelate     # a baseline
    python reconstruct.py reconstruct.photos=FOLDER      # a picture of your own aligned photos
    python reconstruct.py reconstruct.check=true         # check a finished release once more

Reads   data.root, <run>/fold<k>/mae.pt (method facemae)
Writes  <run>/<row>/reconstructed/ (train.rec, train.idx, property, manifest.json, README.md),
        <run>/release.key, <run>/<row>/release.json, <run>/figures/<row>.png

Labels are renumbered and images reordered by a secret in release.key, which is not released; the
masks come from it, too. Every image of fold k is made by the model that never saw its people.
An interrupted release continues where it was; the result is the same for any number of processes.
"""
import facekit.start  # noqa: F401 (first: says what is not installed)

import contextlib
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from facekit import batches, faces, files, images, keys, plots, protect, run
from facekit.check import check_experiment, check_release_files, check_release_images
from facekit.config import as_dict, variants
from facekit.errors import InputError
from facekit.images import to_float
from facekit.progress import StageLog
from facekit.protect import Protection
from facekit.records import RecordWriter
from facekit.sources import FolderSource
from facekit.split import count_release, split

PART = 2048     # images that a process makes between two points where a release can continue

DATA_CARD = """# Released face data set

{facts}

**What it is.** Each image was made from one photo of a real (or drawn) person by the method above
and is stored in insightface's record format. Labels were renumbered and the order was changed by
a secret that is not part of this release. Train on it as on any `train.rec`.

**What it does not promise.** The people are not anonymous. The images are meant to be harder to
re-identify; how hard, and for which attackers, is in the maker's results.json. A person's images
share one label, and their number is visible unless the maker capped it. Which patches of an image
were visible can be read off most released images. Two releases of the same photos say more than
one: with other masks they show other patches.

**What the secret protects.** Masks, noise, order and labels follow from a key the maker keeps.
Whoever has it and the photos can say which released image was made of which photo. A key that
leaked cannot be called back; one that is lost cannot be made again, and nobody, the maker
included, can then match this release with its originals.

**Taking a person out.** The maker, who holds the secret, adds the person's name to
`data.exclude`, makes the release again and replaces this one; models trained on it, too.
"""


def release(variant, folds, device):
    """Write one released data set."""
    cfg = variant.cfg
    maes = protect.load_maes(variant, folds, device)
    secret = keys.release_secret(cfg)
    premises = protect.release_premises(folds, maes, secret)
    plan = protect.plan_release(folds, secret, cfg)
    protections = [Protection(cfg, mae) for mae in maes]

    def check(folder):
        check_release_files(folder, plan, secret, data_card)
        check_release_images(folder, plan, folds[0].private, protections, device)

    if run.broadcast((variant.release / 'manifest.json').exists()):
        protect.check_release(variant, premises)
        if cfg.reconstruct.check:
            check(variant.release)
        else:                # of a Protection whose code was changed since, or this one's
            check_release_images(variant.release, plan, folds[0].private, protections, device)
        return run.say(f'{variant.release} is finished{" and sound" * cfg.reconstruct.check}: '
                       'nothing to do')
    if cfg.reconstruct.method == 'none':
        run.say(f'warning: {variant.release} will hold the photos themselves, to compare with: '
                'never publish it')
    if protect.method_of(cfg).draws_mask:
        visible, patches = protect.visible_count(cfg.data.size, cfg.mae.patch,
                                                 cfg.reconstruct.mask_ratio)
        copied = cfg.reconstruct.method == 'mask' or cfg.reconstruct.paste_visible
        run.say(f'{visible} of {patches} patches of each photo are visible'
                + ', and are copied into the release' * copied)
    counts = count_release(folds, cfg)
    run.say(counts.sentence(cfg.data.exclude))
    draft = own_draft(variant, premises)
    if run.rank() == 0:                 # release.json names the source: it is not released
        files.write_json(variant.folder / 'release.json', {
            'format': files.FORMAT, 'config': as_dict(cfg), 'premises': premises})
    if not run.broadcast((draft / 'train.rec').exists()):
        write_images(variant, draft, plan, folds[0].private, protections, device)

    def finish():
        save_picture(variant, plan, folds[0].private, protections, device)
        publish(variant, draft, plan, counts, check)

    run.on_rank_0(finish)
    run.say(f'released {len(plan.image)} images of {plan.people} people: {variant.release}')


def own_draft(variant, premises):
    """Folder in which a release is written; drafts that were left of other ones are deleted.

    Its name holds a digest of what the release is made from, so that what an interrupted one left
    is never taken for a piece of this one.
    """
    cfg = variant.cfg
    settings = files.settings(as_dict(cfg), [*protect.release_keys(cfg), 'run.precision'])
    made_from = files.digest(repr([settings, premises]).encode())[:16]
    draft = variant.release.with_name(f'reconstructed.{made_from}.tmp')
    if run.rank() == 0:
        for other in set(draft.parent.glob('reconstructed.*.tmp')) - {draft}:
            shutil.rmtree(other)
    return draft


def write_images(variant, draft, plan, private, protections, device):
    """Write the records of a release, PART images a process and round, in order, by rank 0; the
    images of a round are encoded while those of the next one are made."""
    cfg, count = variant.cfg, math.ceil(len(plan.image) / PART)
    source = batches.Store(private.select(np.arange(len(private))), device, once=True)
    stop, encoding = run.Stop(), []
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(run.cores()))
        writer = run.rank() == 0 and stack.enter_context(
            RecordWriter(draft, plan.label, cfg.data.size, PART))

        def write():
            for encoded in run.collect([future.result() for future in encoding]) or ():
                writer.add(encoded)

        begin = run.broadcast(writer and math.ceil(writer.count / PART))
        log = StageLog(cfg.run.folder, f'reconstruct/{variant.label}'.rstrip('/'), count, begin)
        for first in range(begin, count, run.world()):
            pixels = make_part(first + run.rank(), plan, source, protections, cfg, stop)
            write()
            if stop.checkpoint_due(False):
                break
            encoding = [pool.submit(images.encode, x, cfg.reconstruct.format,
                                    cfg.reconstruct.quality) for x in pixels]
            done = min(first + run.world(), count)
            log(done, min((done - begin) * PART, len(plan.image)))
        else:
            write()
            if writer:
                writer.finish()
    stop.checkpoint_due(False)
    stop.leave_if_requested()
    stop.end()


def make_part(number, plan, source, protections, cfg, stop):
    """Released pixels of a part, uint8 (N, 3, H, W), each fold by its own model; or None if the
    process was asked to stop."""
    chosen = slice(number * PART, (number + 1) * PART)
    image, fold, seeds = plan.image[chosen], plan.fold[chosen], plan.seeds[chosen]
    out = torch.empty(len(image), cfg.data.size, cfg.data.size, 3, dtype=torch.uint8)
    size = cfg.reconstruct.batch
    some = [(k, of_fold[i:i + size]) for k in range(len(protections))
            for of_fold in [np.flatnonzero(fold == k)] for i in range(0, len(of_fold), size)]
    for (k, places), originals in zip(some, source.ahead(image[places] for _, places in some)):
        if stop.requested:
            return None
        out[places] = protections[k](originals, seeds[places].to(source.device)).cpu()
    return out.permute(0, 3, 1, 2)


def publish(variant, draft, plan, counts, check):
    """Let a draft whose records are written appear as the release, with its manifest and data
    card, if check(folder) has nothing against it."""
    cfg, c = variant.cfg, variant.cfg.reconstruct
    strength = protect.method_of(cfg).strength
    facts = {'method': c.method, **({strength: getattr(c, strength)} if strength else {}),
             'paste_visible': c.paste_visible and c.method == 'facemae',
             'images': len(plan.image), 'people': plan.people, 'size': cfg.data.size,
             'format': c.format, 'quality': c.quality, **counts.left_out(),
             'made_by': f'FaceMAE kit {run.commit()}'}
    (draft / 'manifest.json').write_text(json.dumps(facts, indent=1) + '\n')
    (draft / 'README.md').write_text(data_card(facts))
    check(draft)
    files.replace_folder(variant.release, draft)


def data_card(facts):
    """README.md of a release with the given manifest."""
    if facts['method'] == 'none':
        return ('# Unprotected photos\n\nThese are the photos themselves, resized and renumbered, '
                'to compare protected releases with. Never publish them.\n')
    return DATA_CARD.format(facts='\n'.join(f'- {k}: {v}' for k, v in facts.items()))


# -------------------------------------------------------------------------------- pictures

def save_picture(variant, plan, private, protections, device):
    """Picture of originals, masked images and the release; it stays in the run folder."""
    places = np.flatnonzero(plan.fold == plan.fold[0])
    some = places[np.linspace(0, len(places) - 1, 8).astype(int)]
    originals = torch.from_numpy(private.select(plan.image[some]).pixels()).to(device)
    show(originals, plan.seeds[some].to(device), protections[plan.fold[0]],
         variant.run / 'figures' / f'{(variant.label or "release").replace("/", "_")}.png')


def show(originals, seeds, protection, path):
    """Picture of uint8 originals (B, H, W, 3), what the mask leaves of them, what is released."""
    rows, cfg = {'original': to_float(originals)}, protection.cfg
    if cfg.reconstruct.method == 'facemae':
        ratio = cfg.reconstruct.mask_ratio
        hidden = protect.hidden_patches(seeds, ratio, cfg)
        rows[f'visible {100 - 100 * ratio:.0f} %'] = protect.greyed(rows['original'], hidden)
    plots.save_grid(rows | {'released': to_float(protection(originals, seeds))}, path)


def picture_of_photos(variant, device):
    """Reconstruct the user's own photos into one picture; nothing is released."""
    cfg, folder = variant.cfg, Path(variant.cfg.reconstruct.photos)
    paths = sorted(f for f in folder.glob('*') if f.suffix.lower() in FolderSource.endings)
    if not paths:
        wrong = 'holds no photo' if folder.is_dir() else 'does not exist'
        raise InputError(f'reconstruct.photos = {folder} {wrong}: name a folder with photos '
                         f'({", ".join(FolderSource.endings)})')
    fold = 0 if cfg.data.public else (cfg.data.release_folds or [0])[0]
    mae = protect.load_mae(variant.mae(fold), cfg, device, run.command('train_mae.py'))
    photos = torch.stack([torch.from_numpy(np.array(images.fitted(
        images.decode(files.open_bytes(f), f, FolderSource.formats), f, cfg.data.size, 'resize')))
        for f in paths[:64]]).to(device)
    faces.warn_if_unaligned(photos.cpu().numpy(), folder)
    seeds = batches.image_seeds(batches.stream(cfg.run.seed, 'photos'),
                                torch.arange(len(photos), device=device))
    path = variant.run / 'figures' / 'photos.png'
    if run.rank() == 0:
        show(photos, seeds, Protection(cfg, mae), path)
    run.say(f'{len(photos)} photos, masked, reconstructed: {path}')


def main(cfg, device, compare):
    if cfg.reconstruct.photos:
        return picture_of_photos(variants(cfg, False)[0], device)
    folds = split(cfg)
    for variant in variants(cfg, compare):
        with files.only_writer(variant.release):
            release(variant, folds, device)


if __name__ == '__main__':
    run.launch(main, check_experiment)

# SPDX-License-Identifier: MIT
"""Stage 2 of FaceMAE: turn the private faces into the set that is released.

    python reconstruct.py
    torchrun --nproc_per_node=8 reconstruct.py --config configs/casia.yaml
    python reconstruct.py reconstruct.method=pixelate run.folder=runs/pixelate     # a baseline
    python reconstruct.py "reconstruct.remove=[NAME]"    # take a person out of all releases
    python reconstruct.py reconstruct.photos=FOLDER      # a picture of your own aligned photos
    python reconstruct.py reconstruct.check=true         # check a finished release once more
    python reconstruct.py reconstruct.export=FOLDER      # a finished release as folders of images

Reads   data.root, <run>/fold<k>/mae.pt (method facemae)
Writes  <run>/<row>/reconstructed/ (train.rec, train.idx, property, manifest.json, README.md),
        <run>/release.key, <run>/<row>/release.json, <run>/figures/<row>.png

Labels are renumbered and images reordered by a secret in release.key, which is not released; the
masks come from it, too. Every image of fold k is made by the model that never saw its people.
A release appears once it is whole and checked; one that was interrupted is made anew. It is the
same for any number of processes.
"""
import facekit.base.start  # noqa: F401 (first: says what is not installed)

import math
import os
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from facekit.base import files, process
from facekit.base.errors import InputError
from facekit.base.config import CONFIGS, variants
from facekit.base.made_from import public_dict
from facekit.base.launch import Stop, command, commit, launch, on_ending_signals
from facekit.base.log import StageLog
from facekit.data import batches, faces, images
from facekit.data.images import to_float
from facekit.data.names import excluded_people
from facekit.data.records import Records, write_records
from facekit.data.sources import FolderSource
from facekit.data.people import count_release, split
from facekit.privacy import protect
from facekit.privacy.contents import (
    check_digests,
    check_records,
    digests,
    made_with,
    manifest_text,
)
from facekit.privacy.protect import Protection
from facekit.privacy.removal import delete, is_run, nets_of_others, results_of, rows_in
from facekit.privacy.release import planned_release
from facekit.report import pictures

PART = 2048     # images that a process makes between two times that all send theirs to process 0

DATA_CARD = """# Released face data set

{facts}

**What it is.** Each image was made from one photo of a real (or drawn) person by the method above
and is stored in insightface's record format. Labels were renumbered and the order was changed by
a secret that is not part of this release. Train on it as on any `train.rec`.

**What it does not promise.** The people are not anonymous. The images are meant to be harder to
re-identify; how hard, and for which attackers, the maker's measured.json tells. A person's images
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
    cfg, planned = variant.cfg, planned_release(variant, folds, device)
    plan, counts = planned.plan, count_release(folds, cfg)
    facts = release_facts(plan, counts, cfg)
    if process.broadcast((variant.release / 'manifest.json').exists()):
        planned.check_published()
        planned.check_files(variant.release, facts, data_card)
        # It may be of a Protection whose code was changed since
        planned.check_images(variant.release, all_images=cfg.reconstruct.check)
        state = 'finished: nothing to do'
        if cfg.reconstruct.check:
            state = check_records(variant, plan.label, encoded_images(planned), device)
        return process.say(f'{variant.release} is {state}')
    refuse_foreign(variant.release)
    planned.check_protections()
    say_what_is_released(variant, counts, planned.private)
    draft = variant.release.with_name(f'{variant.release.name}.tmp')
    encoded = encoded_images(planned)
    if process.rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)           # of an interrupted run
        write_records(draft, encoded, plan.label, cfg.data.size)
    else:
        for _ in encoded:               # none: what this process makes is sent to process 0
            pass

    def finish():
        save_picture(planned)
        (draft / 'manifest.json').write_text(manifest_text(facts))
        (draft / 'README.md').write_text(data_card(facts))
        planned.check_files(draft, facts, data_card)
        planned.check_images(draft)
        refuse_foreign(variant.release)     # that came in the meantime
        if cfg.reconstruct.method == 'none':
            files.make_private(draft)
        # It names the source, and is not released
        files.write_json(variant.folder / 'release.json', {
            'config': public_dict(cfg), 'made_from': planned.made_from, 'files': digests(draft),
            'made_with': made_with(cfg, device)})
        os.sync()                           # a power cut shall not leave empty files in a release
        draft.rename(variant.release)

    process.on_rank_0(finish)
    process.say(f'released {len(plan.image)} images of {plan.people} people: {variant.release}')


def refuse_foreign(folder):
    """Refuse to put a release where something is that this kit did not make."""
    if folder.exists() and not is_empty(folder):
        raise InputError(f'{folder} is there, but is no release of this kit, as it has no '
                         'manifest.json: move it away, or use another run.folder')


def is_empty(folder):
    """Whether a path is a folder with nothing in it."""
    return folder.is_dir() and not any(folder.iterdir())


def say_what_is_released(variant, counts, private):
    """Say what will be released, of whom, before it is made."""
    c = variant.cfg.reconstruct
    if c.method == 'none':
        process.say(f'warning: {variant.release} will hold the photos themselves, to compare '
                    'with: never publish it')
    if protect.method_of(variant.cfg).draws_mask:
        visible, patches = protect.visible_count(variant.cfg.data.size, variant.cfg.mae.patch,
                                                 c.mask_ratio)
        copied = ''
        if c.method == 'mask' or c.paste_visible:
            copied = ', and are copied into the release'
        process.say(f'{visible} of {patches} patches of each photo are visible{copied}')
    out = excluded_people(private.people, variant.cfg)
    process.say(counts.sentence(private.people[out]))


def encoded_images(planned):
    """The files of the released images of a PlannedRelease in their order, on process 0; all
    processes make and encode them, PART images each at a time."""
    variant, private, total = planned.variant, planned.private, len(planned.plan.image)
    cfg, count = variant.cfg, math.ceil(total / PART)
    encode = partial(images.encode, form=cfg.reconstruct.format, quality=cfg.reconstruct.quality)
    store = batches.Store(private.select(np.arange(len(private))), planned.device)
    log = StageLog(cfg.run.folder, f'reconstruct/{variant.label}'.rstrip('/'), count)
    with ThreadPoolExecutor(process.cores()) as pool:
        for first in range(0, count, process.world()):
            pixels = make_part(first + process.rank(), planned, store)
            for part in process.collect(list(pool.map(encode, pixels))) or []:
                yield from part
            done = min(first + process.world(), count)
            log(done, min(done * PART, total))


def make_part(number, planned, store):
    """Released pixels of a part, uint8 (N, 3, H, W), each fold by its own model."""
    plan, protections, cfg = planned.plan, planned.protections, planned.variant.cfg
    chosen = slice(number * PART, (number + 1) * PART)
    image, fold, seeds = plan.image[chosen], plan.fold[chosen], plan.seeds[chosen]
    out = torch.empty(len(image), cfg.data.size, cfg.data.size, 3, dtype=torch.uint8)
    size, some = cfg.reconstruct.batch, []                 # some: (fold, places) of each batch
    for k in range(len(protections)):
        of_fold = np.flatnonzero(fold == k)
        some += [(k, of_fold[i:i + size]) for i in range(0, len(of_fold), size)]
    originals = store.ahead(image[places] for _, places in some)
    for (k, places), batch in zip(some, originals):
        out[places] = protections[k](batch, seeds[places].to(store.device)).cpu()
    return out.permute(0, 3, 1, 2)


def release_facts(plan, counts, cfg):
    """What the manifest and the data card of a release say."""
    c, strength = cfg.reconstruct, protect.method_of(cfg).strength
    return {'method': c.method, **({strength: getattr(c, strength)} if strength else {}),
            'paste_visible': c.paste_visible and c.method == 'facemae',
            'images': len(plan.image), 'people': plan.people, 'size': cfg.data.size,
            'format': c.format, 'quality': c.quality, **counts.left_out(),
            'made_by': f'FaceMAE kit {commit()}'}


def data_card(facts):
    """README.md of a release with the given manifest."""
    if facts['method'] == 'none':
        return ('# Unprotected photos\n\nThese are the photos themselves, resized and renumbered, '
                'to compare protected releases with. Never publish them.\n')
    return DATA_CARD.format(facts='\n'.join(f'- {k}: {v}' for k, v in facts.items()))


def save_picture(planned):
    """Picture of originals, masked images and the release; it stays in the run folder."""
    plan, variant, device = planned.plan, planned.variant, planned.device
    places = np.flatnonzero(plan.fold == plan.fold[0])
    some = places[np.linspace(0, len(places) - 1, 8).astype(int)]
    originals = planned.private.select(plan.image[some]).tensor().to(device)
    show(originals, plan.seeds[some].to(device), planned.protections[plan.fold[0]],
         variant.run / 'figures' / f'{(variant.label or "release").replace("/", "_")}.png')


def show(originals, seeds, protection, path):
    """Picture of uint8 originals (B, H, W, 3), what the mask leaves of them, what is released."""
    rows, cfg = {'original': to_float(originals)}, protection.cfg
    if cfg.reconstruct.method == 'facemae':
        ratio = cfg.reconstruct.mask_ratio
        hidden = protect.hidden_patches(seeds, ratio, cfg)
        rows[f'visible {100 - 100 * ratio:.0f} %'] = protect.greyed(rows['original'], hidden)
    pictures.save_grid(rows | {'released': to_float(protection(originals, seeds))}, path)


def picture_of_photos(variant, device):
    """Reconstruct the user's own photos into one picture; nothing is released."""
    cfg, folder = variant.cfg, Path(variant.cfg.reconstruct.photos)
    paths = sorted(f for f in folder.glob('*') if f.suffix.lower() in FolderSource.endings)
    if not paths:
        wrong = 'holds no photo' if folder.is_dir() else 'does not exist'
        raise InputError(f'reconstruct.photos = {folder} {wrong}: name a folder with photos '
                         f'({", ".join(FolderSource.endings)})')
    fold = 0 if cfg.data.public else (cfg.data.release_folds or [0])[0]
    mae = protect.load_mae(variant.mae(fold), cfg, device, command('train_mae.py'))
    photos = torch.stack([torch.from_numpy(np.array(images.fitted(
        images.decode(files.open_bytes(f), f, FolderSource.formats), f, cfg.data.size, 'resize')))
        for f in paths[:64]]).to(device)
    faces.warn_if_unaligned(photos.cpu().numpy(), folder)
    seeds = batches.image_seeds(batches.stream(cfg.run.seed, 'photos'),
                                torch.arange(len(photos), device=device))
    path = variant.run / 'figures' / 'photos.png'
    if process.rank() == 0:
        show(photos, seeds, Protection(cfg, mae), path)
    process.say(f'{len(photos)} photos, masked, reconstructed: {path}')


def export(variant):
    """Write a finished release into a new folder: a sub-folder for each label, with its image
    files as they stand in the records. Numbers are padded, as other code sorts names as text."""
    folder, release = Path(variant.cfg.reconstruct.export).absolute(), variant.release
    if not (release / 'manifest.json').exists():
        raise InputError(f'{release} is missing: first run `{command("reconstruct.py")}`')
    check_digests(variant)
    if folder.exists() and not is_empty(folder):
        raise InputError(f'reconstruct.export = {folder} is there already: name a new folder')
    form = files.read_json(release / 'manifest.json')['format']
    ending, records = {'jpeg': 'jpg', 'png': 'png'}[form], Records(release)
    digits, digits_of_labels = len(str(len(records))), len(str(records.labels[-1]))
    with files.replacing_folder(folder) as draft:
        if variant.cfg.reconstruct.method == 'none':
            files.make_private(draft)
        for i, label in enumerate(records.labels):
            person = draft / f'{label:0{digits_of_labels}}'
            person.mkdir(exist_ok=True)
            (person / f'{i:0{digits}}.{ending}').write_bytes(records[i])
    process.say(f'{len(records)} images of {records.labels[-1] + 1} people: {folder}')


def main(cfg, device, compare):
    on_ending_signals(Stop.interrupt)                  # there is nothing to save
    if cfg.reconstruct.remove:
        return remove_people(cfg, device)
    if cfg.reconstruct.photos:
        return picture_of_photos(variants(cfg, False)[0], device)
    if cfg.reconstruct.export:
        return process.on_rank_0(lambda: export(variants(cfg, False)[0]))
    make_releases(variants(cfg, compare), split(cfg), device)


def remove_people(cfg, device):
    """Take the people of reconstruct.remove out of a run: delete what was made of them, and make
    the releases that were there again, if no net has to be trained before."""
    c = cfg.reconstruct
    if c.photos or c.export:
        raise InputError('reconstruct.remove goes with neither reconstruct.photos nor '
                         'reconstruct.export: leave these out')
    if not is_run(cfg.run.folder):
        raise InputError(f'run.folder = {cfg.run.folder} holds no run to take somebody out of: '
                         'name the folder of one')
    names, c.remove = c.remove, []
    cfg.data.exclude += names
    folds = split(cfg)              # refuses a name that nobody has; the run folder remembers it
    rows = variants(cfg, True)
    released = process.on_rank_0(lambda: [row.release.exists() for row in rows])
    unnamed = process.on_rank_0(lambda: [
        folder for folder in rows_in(cfg.run.folder) if (folder / 'reconstructed').exists()
        and folder not in [row.folder for row in rows]])
    nets = process.on_rank_0(lambda: nets_of_others(cfg, folds[0]))
    process.on_rank_0(lambda: delete([*nets, *results_of(cfg.run.folder)]))
    process.say(f'out: {", ".join(names)}. Add them to data.exclude of your configs, too, and '
                'replace what was published or exported; the secret is kept')
    if nets:
        process.say('nets learnt from them: no release can be made before these are trained again')
    else:
        make_releases([row for row, there in zip(rows, released) if there], folds, device)
    if unnamed:
        process.say(f'give the rows of {", ".join(map(str, unnamed))} (compare) again to have '
                    'their releases made')
    words = [word for word in sys.argv[1:]
             if '=' in word and not word.startswith(('--', 'reconstruct.remove'))]
    rest = shlex.join([str(CONFIGS.parent / 'reproduce.sh'), cfg.run.config, *words])
    process.say(f'then run `{rest}` for what is missing')


def make_releases(rows, folds, device):
    """release() of Variants, by one run at a time."""
    for variant in rows:
        with process.only_writer(variant.release):
            release(variant, folds, device)


if __name__ == '__main__':
    launch(main)

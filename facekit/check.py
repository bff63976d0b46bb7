"""Checks before the first stage and behind a release: what cannot end well is said, and nothing is
published that is not what it should be."""
import re
from pathlib import Path

import numpy as np
import torch

import models
from facekit import attacks, files, images, keys, protect, run, verification
from facekit.config import SPECS, variants
from facekit.errors import InputError, counted, optional
from facekit.faces import FaceSet
from facekit.published import DLIB, check_installed, refuse_published
from facekit.records import Records
from facekit.sources import open_source
from facekit.split import count_release, make_folds

SAMPLE = 16       # images of a release that are made once more
FEW_PEOPLE = 200  # from fewer no recogniser learns what strangers look like


# ---------------------------------------------------------------------- a whole experiment

def check_experiment(cfg, compare):
    """Say what a run will do, or refuse it if one of its stages would fail; takes seconds.

    Nothing is decoded, trained or written.
    """
    rows = variants(cfg, compare)
    for variant in rows:
        check_models(variant.cfg)
        attacks.check_attacks(variant.cfg)
        check_checkpoints(variant.cfg)
    if cfg.run.tensorboard:
        optional('tensorboard', 'tensorboard')
    if cfg.reconstruct.key:
        keys.read_secret(Path(cfg.reconstruct.key))
    drawn = cfg.data.root == cfg.toy.root and not Path(cfg.data.root).exists()
    if drawn:
        run.say(f'toy faces will be drawn into {cfg.data.root}')
    else:
        check_people(cfg, rows)
    for path in (verification.find_set(name, cfg) for name in cfg.evaluate.sets):
        if not (drawn and path.name == 'toy.bin'):
            verification.read_pairs(path)
    names = ', '.join(f'{v.name} (seed {v.seed})' for v in rows)
    run.say(f'checked: {counted(len(rows), "row")}, {names}; each is released below '
            f'{cfg.run.folder}, where results will be, too')


def check_models(cfg):
    """Refuse sizes of nets that do not fit each other; on the meta device nothing is allocated."""
    strength = protect.method_of(cfg).strength
    if strength and not hasattr(cfg.reconstruct, strength):
        raise InputError(f'reconstruct.{strength}, the strength of the method '
                         f'{cfg.reconstruct.method}, is no key: add it to configs/casia.yaml')
    with torch.device('meta'):
        if cfg.reconstruct.method == 'facemae':
            protect.build_mae(cfg.mae, cfg.data.size)
        for section in ('teacher', 'judge', 'fr'):
            try:
                models.iresnet(getattr(cfg, section).depth, 1)
            except ValueError as error:
                raise InputError(f'{section}.depth: {error}') from None
    if protect.method_of(cfg).draws_mask:
        for ratio in {cfg.mae.mask_ratio, cfg.reconstruct.mask_ratio}:
            protect.visible_count(cfg.data.size, cfg.mae.patch, ratio)


def check_checkpoints(cfg):
    """Refuse a checkpoint that is named but missing, or a recogniser that needs a package that is
    not installed."""
    refuse_published(cfg.teacher.checkpoint, 'the teacher shapes the MAE')
    for key in ('teacher.checkpoint', 'judge.checkpoint', 'mae.init', 'fr.init', 'evaluate.model'):
        section, name = key.split('.')
        path = getattr(getattr(cfg, section), name)
        may_be_dlib = key in ('judge.checkpoint', 'evaluate.model')
        if path and not Path(path).is_file() and not (may_be_dlib and path == DLIB):
            raise InputError(f'{key} = {path} does not exist: check the path')
    check_installed(cfg)


def check_people(cfg, rows):
    """Refuse a split that leaves a stage too few images, told from labels alone."""
    private = undecoded(cfg.data.root)
    public = undecoded(cfg.data.public, len(private)) if cfg.data.public else private
    folds = make_folds(private, public, cfg)
    run.say(count_release(folds, cfg).sentence(cfg.data.exclude))
    warn_of_people(folds)
    if len(folds) == 1 and cfg.data.validation:
        verification.check_held_back(folds[0])
    for variant in rows:
        c, released = variant.cfg, count_release(folds, variant.cfg).images
        for key, batch, count in (
                ('mae.batch', c.mae.batch, min(len(f.mae) for f in folds)),
                ('fr.batch', c.fr.batch, min(released, *(len(f.train) for f in folds)))):
            if batch > count:
                raise InputError(f'{key} = {batch} is larger than the smallest set it is taken '
                                 f'from, {count} images: use a smaller one')


def warn_of_people(folds):
    """Say what may be wrong with who is public, which only the user can tell."""
    public, private = folds[0].public, folds[0].private
    both = sorted(name for name in set(public.people) & set(private.people)
                  if not name.isdecimal())                      # 1, 2, ... are no names
    if public is not private and both:
        run.say(f'warning: {public.path} has {counted(len(both), "name")} of {private.path}, too '
                f'({both[0]}): if they are the same people, the models learn from whom they shall '
                'protect; take them out of one')
    fewest = min(len(np.unique(public.labels[fold.train])) for fold in folds)
    if fewest < FEW_PEOPLE:
        run.say(f'warning: attackers learn from {fewest} people: others may find far more than '
                'they do')


def undecoded(path, first=0):
    """The FaceSet at `path` without its images; numbers from `first` on stand for their hashes."""
    source = open_source(Path(path))
    count = len(source.labels)
    return FaceSet(Path(path), None, source.labels, source.people,
                   np.arange(first, first + count, dtype=np.uint64), [], source)


# --------------------------------------------------------------------------- one release

def check_release_files(folder, plan, secret, card):
    """Refuse a release whose files are not exactly what it may hold.

    folder: of the release; plan: its ReleasePlan; card: a function that makes README.md from
    manifest.json. What is written is compared with what may be written, so that no path, name or
    label of the source needs to be searched for.
    """
    names = sorted(path.name for path in folder.iterdir())
    expected = ['README.md', 'manifest.json', 'property', 'train.idx', 'train.rec']
    refuse(names != expected, folder, f'holds {names}, not {expected}')
    facts = files.read_json(folder / 'manifest.json')
    words = [word for key in ('reconstruct.method', 'reconstruct.format')
             for word in SPECS[key].split(' | ')]
    for key, value in facts.items():
        known = isinstance(value, (int, float)) or value in words or key == 'made_by' and (
            re.fullmatch(r'FaceMAE kit [\w. -]+', str(value)))
        refuse(not known, folder, f'has {key} = {value!r} in its manifest')
    refuse((folder / 'README.md').read_text() != card(facts), folder, 'has another README.md')
    released = Records(folder)
    refuse(not np.array_equal(released.labels, plan.label), folder,
           f'has {len(released)} images whose labels are not the {len(plan.label)} of its plan')
    refuse(facts['images'] != len(plan.label) or facts['people'] != plan.people, folder,
           'has other counts in its manifest')
    secrets = secret, keys.key_of(secret)
    for path in folder.iterdir():
        content = files.open_bytes(path)
        refuse(any(content.find(form) >= 0 for form in (
            key for secret in secrets for key in (
                secret, secret.hex().encode(), secret.hex().upper().encode()))), path,
            'holds the secret')


def check_release_images(folder, plan, private, protections, device):
    """Refuse a release whose images are not those of its plan, or that read a hidden pixel.

    A sample of originals is protected once more and compared with what stands in the release,
    which shows, too, that nobody else's image is there; then with their hidden patches changed,
    which must not change a bit.
    """
    released, c = Records(folder), protections[0].cfg.reconstruct
    refuse(len(released) != len(plan.image), folder,
           f'has {len(released)} images, not the {len(plan.image)} of its plan')
    sample = np.unique(np.linspace(0, len(plan.image) - 1, SAMPLE).astype(int))
    for k in np.unique(plan.fold[sample]):
        chosen = sample[plan.fold[sample] == k]
        originals = torch.from_numpy(private.select(plan.image[chosen]).pixels()).to(device)
        seeds = plan.seeds[chosen].to(device)
        expected = protections[k](originals, seeds)
        for i, image in zip(chosen, expected.cpu()):
            encoded = images.encode(image.permute(2, 0, 1), c.format, c.quality)
            # Other hardware rounds otherwise; another image differs by more than ten times as much
            error = (images.decode(released[i], f'{folder} image {i}').float()
                     - images.decode(encoded, 'image made for comparison')).abs().mean().item()
            refuse(error > 2, folder, f'has another image at {i} than its plan ({error:.1f})')
        if protect.method_of(protections[k].cfg).draws_mask:
            check_hidden(folder, protections[k], originals, seeds, expected)


def check_hidden(folder, protection, originals, seeds, expected):
    """Refuse a protection that is not `expected` any more once hidden pixels are changed, or that
    hides another share of them; originals, expected uint8 (B, H, W, 3)."""
    cfg, ratio = protection.cfg, protection.cfg.reconstruct.mask_ratio
    hidden = protect.hidden_patches(seeds, ratio, cfg)
    visible, patches = protect.visible_count(cfg.data.size, cfg.mae.patch, ratio)
    refuse(bool((hidden.sum(1) != patches - visible).any()), folder,
           f'shows another number of patches than {visible} of {patches}')
    pixels = protect.drawn(hidden, cfg.mae.patch).permute(0, 2, 3, 1)               # (B, H, W, 1)
    changed = torch.where(pixels > 0, 255 - originals, originals)
    refuse(not torch.equal(protection(changed, seeds), expected), folder,
           'would tell hidden pixels')


def refuse(wrong, path, text):
    """InputError about a release, if something is wrong."""
    if wrong:
        raise InputError(f'{path} {text}: it must not be published; delete it, make it again, and '
                         'report this if it stays')

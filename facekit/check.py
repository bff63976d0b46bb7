"""Checks before the first stage: what cannot end well is said, in seconds."""
import math
from pathlib import Path

import numpy as np
import torch

from facekit.base import files, process
from facekit.base.config import SPECS, variants
from facekit.base.errors import InputError, counted
from facekit.base.made_from import check_made_from, settings
from facekit.data.faces import FaceSet, SourceImages, check_apart
from facekit.data.names import excluded_people, looks_of
from facekit.data.pairs import check_held_back, find_set, read_pairs
from facekit.data.people import count_release, make_folds
from facekit.data.sources import open_source
from facekit.forecast import say_forecast
from facekit.nets.published import DLIB, check_installed, refuse_published
from facekit.nets.weights import load_checkpoint
from facekit.privacy import attacks, protect
from facekit.privacy.release import SAMPLE, check_strength, key_file, read_secret

FEW_STEPS = 800   # the demo makes some 900, own.yaml 2,000 with 1,500 photos
FEW_PEOPLE = 200  # from fewer no recogniser learns what strangers look like


def check_experiment(cfg, compare):
    """Say what a run will do, or refuse it if one of its stages would fail. A few photos are
    decoded and steps of untrained nets timed; nothing is written."""
    rows = variants(cfg, compare)
    for variant in rows:
        check_models(variant.cfg)
        attacks.check_attacks(variant.cfg)
        check_checkpoints(variant.cfg)
        check_finished(variant)
    if cfg.reconstruct.key:
        read_secret(key_file(cfg))
    drawn = cfg.data.root == cfg.toy.root and not Path(cfg.data.root).exists()
    if drawn:
        process.say(f'toy faces will be drawn into {cfg.data.root}')
        private = toy_people(cfg)
    else:
        private = undecoded(cfg.data.root, cfg)
    folds = check_people(cfg, rows, private)
    for name in cfg.evaluate.sets:
        path = find_set(name, cfg)
        if not (drawn and path.name == 'toy.bin'):
            read_pairs(path)
    names = ', '.join(f'{v.name} (seed {v.seed})' for v in rows)
    process.say(f'checked: {counted(len(rows), "row")}, {names}; each is released below '
                f'{cfg.run.folder}, where results will be, too')
    say_forecast(cfg, folds, rows)


def check_models(cfg):
    """Refuse sizes of nets that do not fit each other, on the meta device, where nothing is
    allocated; and a protection that cannot be."""
    method, strength = cfg.reconstruct.method, protect.method_of(cfg).strength
    if strength and not hasattr(cfg.reconstruct, strength):
        raise InputError(f'the protection {method} has the strength {strength}, but '
                         f'configs/casia.yaml has no key reconstruct.{strength}: add it there')
    if method == 'blur':
        protect.gaussian_blur()
    if cfg.reconstruct.method == 'facemae':
        with torch.device('meta'):
            protect.build_mae(cfg.mae, cfg.data.size)
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


def check_finished(variant):
    """Refuse settings that finished files of a row were not made with: told from what each of them
    keeps of its settings, before anything is trained."""
    cfg = variant.cfg
    paths = [variant.student, variant.folder / 'release.json']
    if cfg.reconstruct.method == 'facemae':
        paths += [variant.mae(k) for k in range(cfg.data.folds)]
    for path in paths:
        if not path.is_file():
            continue
        content = files.read_json(path) if path.suffix == '.json' else load_checkpoint(path)
        then = files.entry(content, 'made_from')
        now = settings(cfg, [key for key in then if key in SPECS])
        if path.name == 'release.json' and cfg.reconstruct.method == 'facemae':
            name = files.entry(files.entry(content, 'config'), 'mae').get('name')
            then, now = then | {'mae.name': repr(name)}, now | {'mae.name': repr(cfg.mae.name)}
        check_made_from(path, then, now, 'give the other settings a row of their own, '
                        '"compare={NAME: [mae.name=NAME, ...]}"')


def check_people(cfg, rows, private):
    """The Folds of a FaceSet; refuses a split that leaves a stage too few images, told from labels
    alone."""
    public = undecoded(cfg.data.public, cfg, len(private)) if cfg.data.public else private
    folds = make_folds(private, public, cfg)
    out = private.people[excluded_people(private.people, cfg)]
    counts = count_release(folds, cfg)
    process.say(counts.sentence(out))
    both = []
    if public is not private:
        both = [name for name in np.intersect1d(looks_of(public.people), looks_of(private.people))
                if not name.isdecimal()]                        # 1, 2, ... are no names
    if both:
        process.say(f'warning: {public.path} has {counted(len(both), "name")} of {private.path}, '
                    f'too ({both[0]}): if they are the same people, the models learn from whom '
                    'they shall protect; take them out of one')
    fewest = min(len(np.unique(public.labels[fold.train])) for fold in folds)
    if fewest < FEW_PEOPLE:
        process.say(f'warning: nets and attackers learn from {fewest} people: with fewer than '
                    f'{FEW_PEOPLE} figures say little')
    if private.source:
        check_strengths(private.source, cfg, rows)
    warn_of_few_steps(cfg, len(folds[0].mae), counts.images)
    if len(folds) == 1 and cfg.data.validation:
        check_held_back(folds[0])
    for variant in rows:
        c, released = variant.cfg, count_release(folds, variant.cfg).images
        for key, batch, count in (
                ('mae.batch', c.mae.batch, min(len(f.mae) for f in folds)),
                ('fr.batch', c.fr.batch, min(released, *(len(f.train) for f in folds)))):
            if batch > count:
                raise InputError(f'{key} = {batch} is larger than the smallest set it is taken '
                                 f'from, {count} images: use a smaller one')
    return folds


def warn_of_few_steps(cfg, public, released):
    """Say so if a net makes too few steps to learn faces from as many images."""
    for section, images in (('mae', public), ('fr', released)):
        c = getattr(cfg, section)
        in_epoch = max(1, images // c.batch)
        if c.epochs * in_epoch < FEW_STEPS:
            epochs = math.ceil(FEW_STEPS / in_epoch)
            words = f'{section}.epochs={epochs}'
            if section == 'mae' and cfg.irm.weight:
                words += f' irm.warmup_epochs={cfg.irm.warmup_epochs * epochs / c.epochs:.0f}'
            process.say(f'warning: {section}.epochs={c.epochs:g} are '
                        f'{c.epochs * in_epoch:.0f} steps, few for faces: try {words}')


def check_strengths(source, cfg, rows):
    """Refuse distortions that would hardly change a few of the photos; a FaceMAE is checked once
    it is trained."""
    some = np.unique(np.linspace(0, len(source.labels) - 1, SAMPLE).astype(int))
    try:
        photos = SourceImages(source, some, cfg)[:]
    except InputError:
        return                         # damaged ones, which the first look counts and names
    for variant in rows:
        if variant.cfg.reconstruct.method != 'facemae':
            protected = protect.Protection(variant.cfg, None)(photos, torch.arange(len(photos)))
            check_strength(variant.cfg, photos, protected)


def toy_people(cfg):
    """The FaceSet of toy faces that are yet to be drawn, without its images."""
    labels = np.repeat(np.arange(cfg.toy.identities), cfg.toy.images)
    return FaceSet(Path(cfg.data.root), None, labels, np.unique(labels).astype(str),
                   np.arange(len(labels), dtype=np.uint64), [])


def undecoded(path, cfg, first=0):
    """The FaceSet at `path` without its images; numbers from `first` on stand for their hashes."""
    source = open_source(Path(path))
    check_apart(source, cfg)
    hashes = np.arange(first, first + len(source.labels), dtype=np.uint64)
    return FaceSet(Path(path), None, source.labels, source.people, hashes, [], None, source)

"""Who is public and who is private: the folds of a cross-fit, and the proof that nobody is both."""
import hashlib
from dataclasses import dataclass

import numpy as np

from facekit import faces
from facekit.errors import InputError
from facekit.faces import FaceSet


@dataclass
class Fold:
    """A group of private people, and the public people whom its models learn from."""
    k: int                    # number of the group
    public: FaceSet           # set of the public people
    private: FaceSet          # set of the private people; the same one without data.public
    train: np.ndarray         # rows of `public` that train recognisers
    mae: np.ndarray           # rows of `public` that train the MAE: also people with few images
    validation: np.ndarray    # rows of `public` that are kept from all training
    released: np.ndarray      # rows of `private` that are released


def not_excluded(faceset, cfg):
    """Which images of a FaceSet are of nobody in data.exclude: bool (N,)."""
    excluded = [str(name) for name in cfg.data.exclude]
    return ~np.isin(faceset.people, excluded)[faceset.labels]


def split(cfg):
    """The Folds of a config, those of data.release_folds.

    With data.public there is one; otherwise the people of data.root fall into data.folds groups by
    a seeded hash, and each group is private in its fold. InputError if a person or a picture would
    be public and private.
    """
    private = faces.load(cfg.data.root, cfg)
    public = faces.load(cfg.data.public, cfg) if cfg.data.public else private
    allowed = not_excluded(private, cfg)
    counts = np.bincount(private.labels, minlength=len(private.people))
    releasable = (counts >= cfg.data.min_images)[private.labels] & allowed
    folds = []
    for k, group in groups_of(private.people, cfg):
        released = releasable & group[private.labels]
        for_mae = np.ones(len(public), bool) if cfg.data.public else allowed & ~released
        trainable = for_mae if cfg.data.public else releasable & ~released
        validation = held_back_people(public, trainable, cfg)
        fold = Fold(k, public, private, np.flatnonzero(trainable & ~validation),
                    np.flatnonzero(for_mae & ~validation),
                    np.flatnonzero(trainable & validation), np.flatnonzero(released))
        check_disjoint(fold)
        folds.append(fold)
    return folds


def groups_of(people, cfg):
    """Numbers of the groups to release, each with bool (P,): which people are in it."""
    if cfg.data.public:
        return [(0, np.ones(len(people), bool))]
    if cfg.data.folds < 2:
        raise InputError('data.folds = 1 leaves nobody public: set data.folds=2 or more, '
                         'or data.public to another data set')
    wanted = cfg.data.release_folds or range(cfg.data.folds)
    if max(wanted) >= cfg.data.folds:
        raise InputError(f'data.release_folds = {wanted} names a group that does not exist: '
                         f'data.folds = {cfg.data.folds} makes 0..{cfg.data.folds - 1}')
    group = ordered_by_hash(people, cfg.data.split_seed).argsort() % cfg.data.folds
    return [(k, group == k) for k in wanted]


def held_back_people(public, trainable, cfg):
    """Which images of `public` are of people kept from all training (data.validation): bool (N,).

    trainable (N,) bool says whom recognisers could learn from.
    """
    people = np.unique(public.labels[trainable])
    order = ordered_by_hash(public.people[people], cfg.data.split_seed + 1)
    return np.isin(public.labels, people[order][:round(cfg.data.validation * len(people))])


def ordered_by_hash(names, seed):
    """Order of names by a seeded hash: int64 (len(names),)."""
    return np.argsort([hashlib.sha256(f'{seed} {name}'.encode()).digest() for name in names])


def check_disjoint(fold):
    """Refuse a fold that shares a person or a picture between public and private."""
    if not len(fold.released) or not len(fold.train):
        raise InputError(f'fold {fold.k} has {len(fold.train)} public and {len(fold.released)} '
                         'private images: change data.folds, data.min_images or data.validation')
    public, private = fold.public, fold.private
    rows = np.union1d(fold.mae, fold.validation)
    shared = np.intersect1d(public.labels[rows], private.labels[fold.released])
    if public is private and len(shared):
        raise InputError(f'{public.people[shared[0]]} of {public.path} is public and private: '
                         'this is an error of the split, please report it')
    shared, a, b = np.intersect1d(public.hashes[rows], private.hashes[fold.released],
                                  return_indices=True)
    if len(shared):
        people = np.unique(private.people[private.labels[fold.released[b]]]).tolist()
        a, b = rows[a[0]], fold.released[b[0]]
        raise InputError(
            f'image {a} of {public.path} (identity {public.people[public.labels[a]]}) is the '
            f'same picture as private image {b} of {private.path} (identity '
            f'{private.people[private.labels[b]]}), {len(shared)} such in all: leave these '
            f'private people out with data.exclude=[{", ".join(people)}]')


def private_digest(folds):
    """16 hex digits that tell these private images, in this split, from others."""
    return folds[0].private.digest(np.concatenate([f.released for f in folds]))

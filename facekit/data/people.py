"""Who is public and who is private: the folds of a cross-fit; nobody is both."""
import difflib
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from facekit.base import files, process
from facekit.base.errors import InputError, counted
from facekit.data import faces
from facekit.data.faces import FaceSet
from facekit.data.names import (
    excluded_people,
    hashed_look,
    look_of,
    looks_of,
    remember_excluded,
    remembered,
)

# Cosine of images.small_grey() above which two pictures are copies. Measured on LFW: 12 of 11,347
# photos are so alike to one of another person. 1,000 photos that were saved anew, resized, grey or
# mirrored stay above 0.999; of those a fifth brighter, or cut by a pixel, 99 % above 0.988
ALIKE = 0.985


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
    copies: np.ndarray        # rows of `private` that are left out, see is_copy()

    def taught(self, saved):
        """Whether a checkpoint learnt from the public images."""
        learnt = files.entry(saved, 'made_from').get('set of images')
        return any(self.public.digest(rows) == learnt for rows in (self.train, self.mae))

    def check_learnt(self, saved, path, made_by):
        """Refuse a checkpoint, which `made_by` is the command to make, that learnt from other
        images than the public ones: it may have seen who is private here."""
        if not self.taught(saved):
            raise InputError(f'{path} learnt from other images, or label numbers, than are public '
                             f'in this config: change it back (people are taken out by '
                             f'data.exclude), or delete the file and run `{made_by}`')


def not_excluded(faceset, cfg):
    """Which images of a FaceSet are of nobody who is excluded: bool (N,). InputError for a name in
    data.exclude that nobody has, nor had when the run folder learnt it."""
    looks = set()
    if cfg.data.exclude:
        looks.update(looks_of(faceset.people))
    salt, hashes = remembered(cfg.run.folder)
    if unknown := sorted(name for name in cfg.data.exclude if look_of(name) not in looks
                         and hashed_look(look_of(name), salt) not in hashes):
        names = faceset.people.tolist()
        near = difflib.get_close_matches(unknown[0], names, 3) or names[:1]
        raise InputError(f'data.exclude has {unknown[0]!r}, with what base configs exclude, but '
                         f'nobody in {faceset.path} is called so: people there have names such as '
                         f'{" or ".join(near)}; a name with a comma needs quotes of its own, '
                         '["Lee, Ann"]')
    return ~excluded_people(faceset.people, cfg)[faceset.labels]


def split(cfg):
    """The Folds of a config, those of data.release_folds.

    With data.public there is one; otherwise the people of data.root fall into data.folds groups by
    a seeded hash, and each group is private in its fold. The run folder remembers who is excluded.
    """
    private = faces.load(cfg.data.root, cfg)
    public = faces.load(cfg.data.public, cfg) if cfg.data.public else private
    folds = make_folds(private, public, cfg)
    remember_excluded(cfg)
    _, hashes = remembered(cfg.run.folder)
    gone = len(hashes) - excluded_people(private.people, cfg).sum()
    if gone > 0:
        process.say(f'warning: {private.path} has no photos of {gone} of those who are excluded: '
                    'copies of them under other names cannot be told; put the photos back')
    return folds


def make_folds(private, public, cfg):
    """split() of FaceSets; public is private where one set is both."""
    allowed = not_excluded(private, cfg)
    copies = is_copy(private, ~allowed)
    allowed &= ~copies
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
                    np.flatnonzero(trainable & validation), np.flatnonzero(released),
                    np.flatnonzero(copies))
        check_disjoint(fold)
        folds.append(fold)
    return folds


def is_copy(faceset, excluded):
    """Which images are the same picture as one that is excluded, bool (N,), under other names: the
    same file, or what looks like it saved anew, resized, turned, mirrored, brighter."""
    same = np.isin(faceset.hashes, faceset.hashes[excluded])
    if excluded.any() and faceset.look:
        small = faceset.small_greys()
        side = math.isqrt(small.shape[1])
        pictures = small[excluded].reshape(-1, side, side)
        turned = [np.rot90(pictures, quarter, (1, 2)) for quarter in range(4)]
        turned += [picture[:, :, ::-1] for picture in turned]
        wanted = np.concatenate(turned).reshape(-1, side * side)
        wanted = F.normalize(torch.from_numpy(wanted).float())
        for part in torch.arange(len(small)).split(max(1, (1 << 26) // len(wanted))):
            cosine = F.normalize(torch.from_numpy(small[part.numpy()]).float()) @ wanted.T
            same[part] |= (cosine.amax(1) > ALIKE).numpy()
    return same & ~excluded


def groups_of(people, cfg):
    """Numbers of the groups to release, each with bool (P,): which people are in it."""
    if cfg.data.public:
        return [(0, np.ones(len(people), bool))]
    wanted = sorted(set(cfg.data.release_folds)) or range(cfg.data.folds)
    group = np.array([int(share_of(name, cfg.data.split_seed) * cfg.data.folds)
                      for name in people])
    return [(k, group == k) for k in wanted]


def held_back_people(public, trainable, cfg):
    """Which images of `public` are of people kept from all training (data.validation): bool (N,).

    trainable (N,) bool says whom recognisers could learn from.
    """
    held = np.array([share_of(name, f'validation {cfg.data.split_seed}') < cfg.data.validation
                     for name in public.people])
    return held[public.labels] & trainable


def share_of(name, seed):
    """A number in [0, 1) from a seeded hash of a person's name: whoever else is in a set, it stays
    the same."""
    start = hashlib.sha256(f'{seed} {name}'.encode(errors='surrogateescape')).digest()[:8]
    return (int.from_bytes(start) >> 11) / (1 << 53)


def check_disjoint(fold):
    """Refuse a fold that shares a person or a picture between public and private."""
    if not len(fold.released) or not len(fold.train):
        raise InputError(f'fold {fold.k} has {len(fold.train)} public and {len(fold.released)} '
                         'private images: change data.folds, data.release_folds, data.min_images '
                         'or data.validation, or set data.public to another data set')
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
            f'{public.where(a)} (public, of {public.people[public.labels[a]]}) is the same '
            f'picture as {private.where(b)} (private, of {private.people[private.labels[b]]}), '
            f'{len(shared)} such in all: remove the one that is wrong, or leave these private '
            f'people out with data.exclude=[{", ".join(people)}]')


@dataclass
class ReleaseCounts:
    """How many of the private set's people and images are released, and why others are not."""
    people: int               # released
    images: int               # released
    of_people: int            # in the set
    of_images: int
    excluded_people: int      # by data.exclude
    excluded_images: int
    excluded_copies: int      # of these images, under other people's names
    people_with_few: int      # with fewer images than data.min_images
    people_in_other_folds: int    # that data.release_folds leaves out
    damaged_images: int       # left out by data.on_corrupt=skip

    def left_out(self):
        """Counts of who and what is not released, for the manifest."""
        return {name: getattr(self, name) for name in (
            'of_people', 'of_images', 'excluded_people', 'people_with_few', 'damaged_images')}

    def sentence(self, excluded):
        """What will be released, in a line; `excluded`: the names of those people."""
        parts = [f'releases {self.people} of {self.of_people} people, '
                 f'{counted(self.images, "image")}']
        if len(excluded):
            parts.append(f'excluded: {", ".join(excluded)} '
                         f'({counted(self.excluded_images, "image")})')
        if self.excluded_copies:
            parts.append(f'excluded, too: {counted(self.excluded_copies, "image")} of others, the '
                         'same picture as one of theirs, or nearly')
        if self.people_with_few:
            parts.append(f'{self.people_with_few} with fewer than data.min_images')
        if self.people_in_other_folds:
            parts.append(f'the nets learn from {self.people_in_other_folds} others '
                         '(data.release_folds)')
        return '; '.join(parts)


def count_release(folds, cfg):
    """The ReleaseCounts of Folds."""
    private = folds[0].private
    images = np.bincount(private.labels, minlength=len(private.people))
    excluded = excluded_people(private.people, cfg)
    few = ~excluded & (images < cfg.data.min_images)
    rows = np.concatenate([f.released for f in folds])
    released = np.bincount(private.labels[rows], minlength=len(images))
    most = cfg.reconstruct.images_per_person or len(rows)
    people = int((released > 0).sum())
    return ReleaseCounts(
        people=people, images=int(released.clip(max=most).sum()), of_people=len(images),
        of_images=len(private), excluded_people=int(excluded.sum()),
        excluded_images=int(images[excluded].sum()),
        excluded_copies=len(folds[0].copies),
        people_with_few=int(few.sum()),
        people_in_other_folds=len(images) - int(excluded.sum() + few.sum()) - people,
        damaged_images=len(private.skipped))


def private_digest(folds):
    """16 hex digits that tell these private images, in this split, from others."""
    return folds[0].private.digest(np.concatenate([f.released for f in folds]))

"""What attackers meet and have: groups of people, from own folds or a foreign release."""
from dataclasses import dataclass, field

import numpy as np
import torch

import models
from facekit import batches, faces
from facekit.errors import InputError
from facekit.faces import ImageRows
from facekit.protect import Protection, draws_mask
from facekit.split import not_excluded, share_of


@dataclass
class AttackGroup:
    """Private people who are attacked together, and what attackers may have beside the release.

    Attackers learn from pairs (protected image, original) of other people: those of a fold's own
    public people, whom they protect themselves by `protection`, or, for a foreign release, those
    of the other half of its people, as they were released.
    """
    released: ImageRows              # n released images, the probes
    originals: ImageRows             # N originals, the gallery
    source: np.ndarray               # int64 (n,): position of each probe's original in the gallery
    person: np.ndarray               # int64 (N,): whose original it is
    pair_originals: ImageRows        # M originals of other people
    pair_person: np.ndarray          # int64 (M,): whose; numbers that `person` has not
    pair_released: ImageRows | None = None      # what was released of them, of a foreign release
    protection: Protection | None = None        # makes released images; None = foreign release
    hidden: torch.Tensor | None = None   # float32 (n, L), 1 where a probe's patch was masked
    outsiders: ImageRows | None = None   # images of people who are in no training and no release
    device: torch.device = torch.device('cpu')
    embedded: dict = field(default_factory=dict)   # {Embedder.name: embeddings of `released`}

    def __post_init__(self):
        if shared := set(self.pair_person) & set(self.person):
            raise InputError(f'person {min(shared)} is attacked and in an attacker\'s training: '
                             'this is an error of the split, please report it')

    def read_often(self):
        """The ImageRows that attackers read again and again."""
        every = self.released, self.originals, self.pair_originals, self.pair_released
        return [rows for rows in every if rows is not None]

    def training_pairs(self, chosen, seed):
        """Pairs `chosen` (int64 (B,)) of the M, protected with `seed`: protected images and their
        originals, two uint8 arrays (B, H, W, 3)."""
        originals = self.pair_originals.take(chosen)
        if self.pair_released:
            return self.pair_released.take(chosen).pixels(), originals.pixels()
        return self.protected(originals, seed), originals.pixels()

    def pair_hidden(self, chosen, seed):
        """Which patches training_pairs(chosen, seed) hides: float32 (B, L), 1 = hidden. Known to
        the attacker, who protected these images."""
        originals = self.pair_originals.take(chosen)
        return hidden_patches(self.protection, attacker_seeds(originals, seed),
                              originals.images.shape[1])

    def is_random(self):
        """Whether another release of the same photos would differ: the method draws something."""
        some = self.originals.take(np.arange(min(8, len(self.originals))))
        return bool(self.protection) and not np.array_equal(self.protected(some, 0),
                                                            self.protected(some, 1))

    def released_with(self, seed):
        """The n probes made once more with other masks or noise: uint8 (n, H, W, 3)."""
        return self.protected(self.sources(), seed)

    def sources(self):
        """ImageRows of the original of each probe."""
        return self.originals.take(self.source)

    def protected(self, chosen, seed):
        """ImageRows protected with numbers drawn from `seed`: uint8 (len(chosen), H, W, 3)."""
        return self.protection.of_rows(chosen, attacker_seeds(chosen, seed), self.device)

    def probe_embeddings(self, embedder):
        """Unit embeddings (n, d) of the probes, made once."""
        if embedder.name not in self.embedded:
            self.embedded[embedder.name] = embedder.embed(self.released)
        return self.embedded[embedder.name]

    def gallery_embeddings(self, embedder):
        """Unit embeddings (N, d) of the gallery, made once for all rows of a comparison that
        search the same."""
        if not np.array_equal(embedder.gallery_rows, self.originals.rows):
            embedder.gallery_rows = self.originals.rows
            embedder.gallery = embedder.embed(self.originals)
        return embedder.gallery


def attacker_seeds(chosen, seed):
    """What decides masks and noise where an attacker protects ImageRows himself: int64 (N,)."""
    return batches.image_seeds(batches.stream(seed, 'attacker'), chosen.rows)


def hidden_patches(protection, seeds, size):
    """float32 (B, L), 1 where a patch is hidden, of images of `size` pixels with seeds (B,)."""
    noise = protection.patch_noise(seeds, size)
    return models.random_masking(noise, protection.cfg.reconstruct.mask_ratio)[2]


def some_of(cfg, count):
    """Which of `count` images are searched for or learnt from: all, or a fixed random choice of
    evaluate.probes; int64, rising."""
    chosen = np.random.default_rng(0).permutation(count)
    return np.sort(chosen[:cfg.evaluate.probes or count])


def searched(rows, people, asked, cfg):
    """Which of `rows` (int64, rising) make the gallery: all images of the people who are `asked`
    for, and of all others, people (N,) says whose, evaluate.gallery as a fixed random choice."""
    others = rows[~np.isin(people[rows], asked)]
    few = np.random.default_rng(2).permutation(others)[cfg.evaluate.gallery or len(others):]
    return np.setdiff1d(rows, few, assume_unique=True)


def own_groups(cfg, folds, maes, release, plan, device):
    """The released people of each fold as an AttackGroup; release: FaceSet of what was released by
    a ReleasePlan.

    The attackers' pairs are public people, whom the fold's own model protects for them.
    """
    private = folds[0].private
    probes = some_of(cfg, len(plan.image))
    # Equally many in all folds, so that curves can be pooled
    pairs = len(some_of(cfg, min(len(f.train) for f in folds)))
    nobody = np.setdiff1d(np.flatnonzero(not_excluded(private, cfg)),
                          np.concatenate([f.released for f in folds]))
    outsiders = private.select(nobody[some_of(cfg, len(nobody))])
    groups = []
    for k, fold in enumerate(folds):
        rows, protection = probes[plan.fold[probes] == k], Protection(cfg, maes[k])
        known = np.random.default_rng(1).permutation(fold.mae)
        # First people whom judge and teacher never saw: a map between photos that they know by
        # heart fits others less
        known = known[np.argsort(np.isin(known, fold.train), kind='stable')][:pairs]
        people = fold.public.labels[known]
        gallery = searched(fold.released, private.labels, private.labels[plan.image[rows]], cfg)
        hidden = None
        if draws_mask(cfg.reconstruct.method):
            hidden = hidden_patches(protection, plan.seeds[rows], cfg.data.size)
        groups.append(AttackGroup(
            released=release.select(rows), originals=private.select(gallery),
            source=np.searchsorted(gallery, plan.image[rows]),
            person=private.labels[gallery], pair_originals=fold.public.select(known),
            # Of another data set, labels say nothing about who it is
            pair_person=people if fold.public is private else -1 - people,
            protection=protection, hidden=hidden, outsiders=outsiders, device=device))
    return groups


def foreign_groups(cfg, release, device):
    """Somebody's release beside its originals, as two AttackGroups: half of the people are
    attacked by those who know the released images of the other half."""
    if not (cfg.release and cfg.originals):
        raise InputError('release and originals belong together: give both paths')
    originals = faces.load(cfg.originals, cfg)
    if len(release) != len(originals) or release.skipped != originals.skipped:
        raise InputError(f'release has {len(release)} good images and originals '
                         f'{len(originals)}: both need the same, in one order')
    groups = [len(np.unique(labels, axis=-1).T) for labels in (
        release.labels, originals.labels, np.stack([release.labels, originals.labels]))]
    if len(set(groups)) > 1:
        raise InputError('release and originals do not put the same images into one person: both '
                         'need the same order (what this kit releases is shuffled on purpose)')
    half = np.array([share_of(name, 0) < 0.5 for name in originals.people])[originals.labels]
    probes = some_of(cfg, len(half))
    pairs = len(some_of(cfg, min(half.sum(), (~half).sum())))
    if half.all() or not half.any():
        raise InputError(f'the {len(originals.people)} people of {originals.path} all fall into '
                         'one half, whose attackers know nobody: bring more people')
    groups = []
    for side in (True, False):
        gallery, known = np.flatnonzero(half == side), np.flatnonzero(half != side)
        rows = probes[np.isin(probes, gallery)]
        gallery = searched(gallery, originals.labels, originals.labels[rows], cfg)
        known = np.random.default_rng(1).permutation(known)[:pairs]
        groups.append(AttackGroup(
            released=release.select(rows), originals=originals.select(gallery),
            source=np.searchsorted(gallery, rows), person=originals.labels[gallery],
            pair_originals=originals.select(known), pair_person=originals.labels[known],
            pair_released=release.select(known), device=device))
    return groups

"""What attackers meet and have: groups of people, from own folds or a foreign release, and the
recognisers to compare their images by."""
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from facekit.base.errors import InputError
from facekit.base.launch import command
from facekit.data import batches, faces
from facekit.data.faces import ImageRows
from facekit.data.people import Fold, not_excluded, share_of
from facekit.measure.retrieval import Search
from facekit.nets.embed import Embedder
from facekit.nets.weights import recogniser
from facekit.privacy.partners import check_alike, partners
from facekit.privacy.protect import Protection, hidden_patches, method_of


@dataclass
class AttackGroup:
    """Private people who are attacked together, and what attackers may have beside the release.

    Attackers learn from pairs (protected image, original) of other people: the fold's public ones,
    whom they protect themselves by `protection`, or of a foreign release the other half.
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
    outsiders: ImageRows | None = None   # images of people in no training and no release: a share
    device: torch.device = torch.device('cpu')     # that embeds, trains and compares
    embedded: dict = field(default_factory=dict)   # {Embedder.name: embeddings of `released`}

    def __post_init__(self):
        if shared := set(self.pair_person) & set(self.person):
            raise InputError(f'person {min(shared)} is attacked and in an attacker\'s training: '
                             'this is an error of the split, please report it')

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
        cfg, seeds = self.protection.cfg, attacker_seeds(self.pair_originals.take(chosen), seed)
        return hidden_patches(seeds, cfg.reconstruct.mask_ratio, cfg)

    def is_random(self):
        """Whether another release of the same photos would differ: the method draws something."""
        if not self.protection:
            return False
        some = self.originals.take(np.arange(min(8, len(self.originals))))
        return not np.array_equal(self.protected(some, 0), self.protected(some, 1))

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
        """Unit embeddings (N, d) of the gallery, made once for all rows that search the same."""
        if not np.array_equal(embedder.gallery_rows, self.originals.rows):
            embedder.gallery_rows = self.originals.rows
            embedder.gallery = embedder.embed(self.originals)
        return embedder.gallery

    def search(self, probes, gallery, **settings):
        """The Search of probes (n, d) in a gallery (N, d) that stand for these images."""
        return Search(probes, gallery, self.source, self.person, self.device, **settings)


@dataclass
class Owned:
    """What the attackers of one group own beside it: embedders, each loaded when it is first asked
    for, and the recogniser that was trained on the release."""
    cfg: object                       # the config of the row
    number: int                       # of the group
    fold: Fold | None                 # whose people are attacked; None = a foreign release
    device: torch.device
    # {(path or 'pixels', number): Embedder} of all rows of a comparison: they hold the embeddings
    # of the originals, which are the same in all rows
    cache: dict
    insider: Embedder | None = None   # the recogniser that was trained on the release
    student: Path | None = None       # its checkpoint

    def embedder(self, name):
        """The Embedder called judge, teacher, pixels or insider (or None), or at a path. Judge and
        teacher are those of this run, which learnt from the fold's public people, or named."""
        if name == 'insider':
            return self.insider
        path, made_by = name, ''
        if name in ('judge', 'teacher'):
            path = getattr(self.cfg, name).checkpoint
        if not path:
            number = self.fold.k if self.fold else 0
            path = str(Path(self.cfg.run.folder, f'fold{number}', f'{name}.pt'))
            made_by = command('train_fr.py', f'stage={name}')
        if (path, self.number) not in self.cache:
            net = None if name == 'pixels' else self.load(path, name, made_by)
            self.cache[path, self.number] = Embedder(path, net, self.cfg, self.device)
        return self.cache[path, self.number]

    def load(self, path, role, made_by):
        """The recogniser at a path; made_by: the command that makes one of this run, or ''."""
        if made_by and not Path(path).is_file():
            raise InputError(f'{path} is missing: first run `{made_by}`, or name the {role} of '
                             f'another run by {role}.checkpoint=PATH')
        return recogniser(path, self.device, made_by, self.cfg.evaluate.onnx_pixels,
                          self.fold if made_by else None)

    def without_pairs(self):
        """{name: Embedder} of all that were made without pairs of other people."""
        every = {'recogniser': self.embedder('judge'), 'pixels': self.embedder('pixels'),
                 'insider': self.insider}
        return {name: embedder for name, embedder in every.items() if embedder}


def keep_images(groups):
    """Decode what the attackers of AttackGroups read again and again into the host's memory, where
    they protect and encode it: of one set once, for all groups together."""
    rows_of = {}
    for group in groups:
        for chosen in (group.released, group.originals, group.pair_originals, group.pair_released):
            if chosen is not None:
                rows_of.setdefault(chosen.images, []).append(chosen.rows)
    for images, rows in rows_of.items():
        images.keep(np.unique(np.concatenate(rows)), torch.device('cpu'))


def attacker_seeds(chosen, seed):
    """What decides masks and noise where an attacker protects ImageRows himself: int64 (N,)."""
    return batches.image_seeds(batches.stream(seed, 'attacker'), chosen.rows)


def some_of(cfg, count):
    """Which of `count` images are used: all, or a fixed random choice of evaluate.probes; int64,
    rising."""
    chosen = np.random.default_rng(0).permutation(count)
    return np.sort(chosen[:cfg.evaluate.probes or count])


def searched(rows, people, asked, cfg):
    """Which of `rows` (int64, rising) make the gallery: all images of people (N,) who are `asked`
    for, and evaluate.gallery of the others, a fixed random choice."""
    others = rows[~np.isin(people[rows], asked)]
    few = np.random.default_rng(2).permutation(others)[cfg.evaluate.gallery or len(others):]
    return np.setdiff1d(rows, few, assume_unique=True)


def own_groups(cfg, folds, protections, release, plan, device):
    """The released people of each fold, whom its Protection protects, as an AttackGroup; release:
    FaceSet of what was released by a ReleasePlan."""
    private = folds[0].private
    probes = some_of(cfg, len(plan.image))
    pairs = len(some_of(cfg, min(len(f.train) for f in folds)))
    nobody = np.setdiff1d(np.flatnonzero(not_excluded(private, cfg)),
                          np.concatenate([f.released for f in folds]))
    outsiders = np.array_split(nobody[some_of(cfg, len(nobody))], len(folds))
    groups = []
    for k, fold in enumerate(folds):
        rows = probes[plan.fold[probes] == k]
        known = np.random.default_rng(1).permutation(fold.mae)
        # Prefer people outside the recognisers' training: a map fitted on memorised faces
        # transfers badly
        known = known[np.argsort(np.isin(known, fold.train), kind='stable')][:pairs]
        people = fold.public.labels[known]
        gallery = searched(fold.released, private.labels, private.labels[plan.image[rows]], cfg)
        hidden = None
        if method_of(cfg).draws_mask:
            hidden = hidden_patches(plan.seeds[rows], cfg.reconstruct.mask_ratio, cfg)
        groups.append(AttackGroup(
            released=release.select(rows), originals=private.select(gallery),
            source=np.searchsorted(gallery, plan.image[rows]),
            person=private.labels[gallery], pair_originals=fold.public.select(known),
            # Of another data set, labels say nothing about who it is
            pair_person=people if fold.public is private else -1 - people,
            protection=protections[k], hidden=hidden,
            outsiders=private.select(outsiders[k]), device=device))
    return groups


def foreign_groups(cfg, release, device):
    """Somebody's release beside its originals, as two AttackGroups: half of the people are
    attacked by those who know the released images of the other half."""
    if not (cfg.release and cfg.originals):
        raise InputError('release and originals belong together: give both paths')
    originals = faces.load(cfg.originals, cfg)
    partner = partners(release, originals)             # int64 (N,): released row of each original
    check_alike(release.select(partner), originals, device)
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
            released=release.select(partner[rows]), originals=originals.select(gallery),
            source=np.searchsorted(gallery, rows), person=originals.labels[gallery],
            pair_originals=originals.select(known), pair_person=originals.labels[known],
            pair_released=release.select(partner[known]), device=device))
    return groups

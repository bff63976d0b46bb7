"""A leak check of a set whose images have no partners, such as a synthetic one: which images are
nearer to an original than strangers ever are to each other?"""
from dataclasses import dataclass

import numpy as np
import torch

LIMIT = 0.999         # share of strangers' photos whose nearest one is less alike


@dataclass
class Leak:
    """What the nearest originals of released images tell, as one embedder sees them."""
    cosine: np.ndarray        # float32 (n,): of each released image and its nearest original
    nearest: np.ndarray       # int64 (n,): row of that original
    strangers: np.ndarray     # float32 (N,): of each original and the nearest of another person

    def figures(self):
        """What external.json has of it."""
        limit = float(np.quantile(self.strangers, LIMIT))
        beyond = int((self.cosine > limit).sum())
        return {'beyond': beyond, 'expected': (1 - LIMIT) * len(self.cosine),
                'images': len(self.cosine), 'originals': len(self.strangers), 'limit': limit,
                'median': float(np.median(self.cosine)), 'highest': float(self.cosine.max()),
                'median_of_strangers': float(np.median(self.strangers)),
                'highest_of_strangers': float(self.strangers.max())}

    def sentence(self):
        """How many released images are too near to an original."""
        f = self.figures()
        return (f'{f["beyond"]} of {f["images"]} images are nearer to an original than '
                f'{100 * LIMIT:.1f} % of strangers to each other (expected: {f["expected"]:.1f})')

    def surest(self, count=10):
        """The released images, int64 (count,), that are most like an original."""
        return self.cosine.argsort()[::-1][:count]


def find_leak(embedder, release, originals):
    """The Leak of a FaceSet `release` towards the FaceSet of the originals that it was made from,
    as an Embedder sees both.

    The same search among the originals, each without its own person, says how alike people are who
    have nothing to do with each other; photos of one person under two names make it too mild.
    """
    gallery = embedder.embed(originals.select(np.arange(len(originals))))
    probes = embedder.embed(release.select(np.arange(len(release))))
    person = torch.from_numpy(originals.labels)
    cosine, nearest = nearest_of(probes, gallery)
    strangers, _ = nearest_of(gallery, gallery, person, person)
    return Leak(cosine, nearest, strangers)


def nearest_of(probes, gallery, person=None, gallery_person=None):
    """The largest cosine of unit vectors (n, d) with a gallery (N, d), and where it is: float32
    and int64 (n,), numpy. person int64 (n,) and (N,): who is not compared with himself."""
    best, place = [], []
    for some in torch.arange(len(probes)).split(max(1, (1 << 27) // len(gallery))):
        cosines = probes[some].to(gallery.device) @ gallery.T
        if person is not None:
            same = (person[some, None] == gallery_person).to(gallery.device)
            cosines.masked_fill_(same, -torch.inf)
        value, index = cosines.max(1)
        best.append(value.cpu())
        place.append(index.cpu())
    return torch.cat(best).numpy(), torch.cat(place).numpy()

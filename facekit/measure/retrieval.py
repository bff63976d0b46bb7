"""Retrieval: how often a probe finds what it was made from among all originals, exactly.

Each question has its chance level and its ceiling (originals as probes). *same_image*: does the
very original come first? *same_person*: does another photo of the person come first? *label*, of
means of a person's images: does the person's own mean come first?
"""
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from facekit.base.process import dealt
from facekit.data.people import share_of
from facekit.measure.statistics import interval

BLOCK = 16384        # gallery items whose scores are in memory at a time
PROBES = 512         # probes that are ranked at a time


@dataclass
class Search:
    """Probes and a gallery, compared by inner product on a device; both may lie on the host."""
    probes: torch.Tensor               # float32 (n, d)
    gallery: torch.Tensor              # float32 (N, d)
    source: np.ndarray                 # int64 (n,): gallery item that each probe was made from
    person: np.ndarray                 # int64 (N,): whose item
    device: torch.device
    ceiling_probes: torch.Tensor | None = None   # originals as probes; None = gallery[source]
    is_cosine: bool = True             # whether probes and gallery are unit vectors
    centre: torch.Tensor | None = None           # float32 (d,), subtracted from gallery items

    def centred(self):
        """The same without the mean embedding of each side: blur and noise shift all embeddings
        alike; uncentred, the judge finds a third fewer."""
        ceiling_probes = self.ceiling_probes
        if ceiling_probes is not None:
            ceiling_probes = F.normalize(ceiling_probes - ceiling_probes.mean(0))
        return replace(self, probes=F.normalize(self.probes - self.probes.mean(0)),
                       ceiling_probes=ceiling_probes, centre=self.gallery.mean(0))

    def items(self, chosen):
        """Gallery items on the device. They are centred here, so that no second gallery is needed
        in memory."""
        if torch.is_tensor(chosen):
            chosen = chosen.to(self.gallery.device)
        items = self.gallery[chosen].to(self.device, non_blocking=True)
        if self.centre is None:
            return items
        return F.normalize(items - self.centre.to(self.device), dim=-1)

    def some_probes(self, chosen, originals=False):
        """Probes (b, d) on the device, by their numbers (b,), or the originals in their place."""
        probes = self.ceiling_probes if originals else self.probes
        if probes is None:
            return self.items(torch.as_tensor(self.source)[chosen.cpu()])
        return probes[chosen.to(probes.device)].to(self.device)

    def ids(self, question):
        """Ids of probes (n,) and gallery (N,), on the device: the items with a probe's id are its
        targets. And the item that is excluded from each probe's gallery (n,), or None."""
        source = torch.as_tensor(self.source, device=self.device)
        if question == 'same_person':
            person = torch.as_tensor(self.person, device=self.device)
            return person[source], person, source
        return source, torch.arange(len(self.gallery), device=self.device), None

    def scores_of_sources(self):
        """The score of each probe with its own original, float32 (n,), numpy."""
        parts = torch.arange(len(self.source)).split(BLOCK)
        source = torch.as_tensor(self.source)
        return torch.cat([(self.some_probes(part) * self.items(source[part])).sum(1).cpu()
                          for part in parts]).numpy()


@dataclass
class Ranking:
    """How the m probes fare that have a target, float32 or int64 (m,) each, on the CPU."""
    first: torch.Tensor        # how likely a target comes first: 0 or 1, or its share of a tie
    chance: torch.Tensor       # the same by guessing
    probe: torch.Tensor        # int64: which probe

    def some(self, chosen):
        """The Ranking of some of these probes, bool (m,)."""
        chosen = torch.from_numpy(chosen)
        return Ranking(self.first[chosen], self.chance[chosen], self.probe[chosen])


def rank(search, question, originals=False, block=BLOCK):
    """The Ranking of a Search, or that of the originals as probes; exact, in bounded memory. Each
    process takes a share of the probes."""
    probe_ids, gallery_ids, excluded = search.ids(question)
    order = gallery_ids.argsort(stable=True)
    begin = torch.searchsorted(gallery_ids[order], probe_ids)
    end = torch.searchsorted(gallery_ids[order], probe_ids, right=True)
    most = int((end - begin).max())
    parts = torch.arange(len(probe_ids), device=search.device).split(PROBES)

    def ranked(number):
        part = parts[number]
        place = begin[part, None] + torch.arange(most, device=search.device)         # (b, m)
        target, valid = order[place.clamp(max=len(order) - 1)], place < end[part, None]
        if excluded is not None:
            valid &= target != excluded[part, None]
        part, target, valid = (t[valid.any(1)] for t in (part, target, valid))
        first = share_of_first(search, search.some_probes(part, originals), target, valid,
                               (probe_ids[part], gallery_ids), block)
        chance = valid.sum(1) / (len(gallery_ids) - (excluded is not None))
        return [t.cpu() for t in (first, chance, part)]

    return Ranking(*(torch.cat(parts_) for parts_ in zip(*dealt(len(parts), ranked))))


def share_of_first(search, probes, target, valid, ids, block):
    """How likely a target comes first where ties are drawn by lot, float32 (b,).

    probes (b, d); target, valid (b, m): gallery items to find, and which of the m count; ids (b,)
    of the probes and (N,) of the gallery: equal where an item is no distractor.
    """
    scores = torch.cat([exact(probes[:, None], search.items(some))
                        for some in target.split(32, 1)], 1).masked_fill(~valid, -torch.inf)
    best = scores.amax(1, keepdim=True)
    above, tied = torch.zeros(2, len(probes), device=search.device)
    for begin in range(0, len(search.gallery), block):
        some = slice(begin, begin + block)
        more, equal = compared(probes, search.items(some), best, ids[0][:, None] == ids[1][some])
        above += more
        tied += equal
    targets = (scores == best).sum(1)
    return torch.where(above == 0, targets / (targets + tied), 0)


def compared(probes, items, best, same):
    """How many `items` (N, d) have an exact() score above best (b, 1), and how many an equal one:
    int64 (b,) twice; same (b, N): which do not count.

    A product in float32 decides, and float64 where that could be wrong: it is slow on most GPUs.
    """
    score = (probes @ items.T).masked_fill(same, -torch.inf)
    # Twice what rounding can change in a sum of d products
    doubt = (probes.shape[1] * torch.finfo(torch.float32).eps
             * probes.norm(dim=1, keepdim=True) * items.norm(dim=1).amax())
    close = ((score - best).abs() <= doubt).nonzero()
    for some in close.split(16384):
        probe, item = some.unbind(1)
        score[probe, item] = exact(probes[probe], items[item])
    return (score > best).sum(1), (score == best).sum(1)


def exact(a, b):
    """Inner products of rows of float32 tensors (..., d), summed in float64, rounded to float32:
    in float32 the last bit of a sum depends on the shapes, and rounding would decide ties."""
    return (a.double() * b.double()).sum(-1).float()


@dataclass
class BestWay:
    """The way of an attacker that is reported, for one question, over all groups."""
    name: str
    question: str
    searches: list             # a Search a group
    rankings: list             # the Ranking of each
    ways: int = 1              # how many were tried

    def people(self):
        """Whose probes are ranked, int64 (m,) of each group."""
        return [s.person[s.source[r.probe.numpy()]] for s, r in zip(self.searches, self.rankings)]

    def choosing(self):
        """Which ranked probes choose among ways, bool (m,) of each group: those of half of the
        people, by a seeded hash, so that the other half is no reason for the choice."""
        halves = []
        for person in self.people():
            who, index = np.unique(person, return_inverse=True)
            chooses = [share_of(name, 'choice of a way') < 0.5 for name in who]
            halves.append(np.array(chooses, bool)[index])
        return halves

    def figures(self):
        """What results.json has of it: a way that was chosen is reported on the people who did
        not choose it, one without another way on all. `rank1_of_choosers` chooses the strongest
        attacker alike."""
        reported = [~chooses for chooses in self.choosing()]
        if self.ways == 1 or len({*np.concatenate(reported)}) == 1:
            reported = [np.ones(len(some), bool) for some in reported]
        ceilings = [rank(s, self.question, originals=True) for s in self.searches]
        rankings, ceilings = ([r.some(part) for r, part in zip(every, reported)]
                              for every in (self.rankings, ceilings))
        person = [some[part] for some, part in zip(self.people(), reported)]
        return summary(rankings, ceilings, np.concatenate(person)) | {
            'way': self.name, 'ways': self.ways, 'rank1_of_choosers': share_found(self)}

    def cosines(self):
        """Cosine of each probe with its own original, float32 (n,); None if scores are none."""
        if not all(s.is_cosine for s in self.searches):
            return None
        return np.concatenate([s.scores_of_sources() for s in self.searches])


def best_ways(attempts, questions):
    """{question: BestWay} of what one attacker tries, {name of a way: Search} a group, where
    embeddings are compared as they are and centred. The way that finds most for half of the people
    is the best one; see BestWay.choosing()."""
    best, found, tried = {}, {}, 0
    for name in attempts[0]:
        plain = [searches[name] for searches in attempts]
        versions = {name: plain}
        if all(s.is_cosine for s in plain):
            versions[f'{name}, centred'] = [s.centred() for s in plain]
        tried += len(versions)
        for way, searches in versions.items():
            for question in questions:
                new = BestWay(way, question, searches, [rank(s, question) for s in searches])
                share = share_found(new)
                if share is not None and (question not in best or share > found[question]):
                    best[question], found[question] = new, share
    return {question: replace(way, ways=tried) for question, way in best.items()}


def share_found(way):
    """Rank 1 among the probes that choose between ways, or among all if none does; None without
    any probe that has a target."""
    chosen = [r.some(part) for r, part in zip(way.rankings, way.choosing())]
    for rankings in (chosen, way.rankings):
        if any(len(r.first) for r in rankings):
            return rank1(rankings)
    return None


def rank1(rankings):
    """Share of probes whose target comes first, over several Rankings."""
    return torch.cat([r.first for r in rankings]).mean(dtype=torch.float64).item()


def summary(rankings, ceilings, person):
    """Rankings of all groups, and those of originals as probes, as figures; person (m,) of each
    probe."""
    first, chance = (torch.cat([getattr(r, name) for r in rankings]).numpy()
                     for name in ('first', 'chance'))
    who, count = np.unique(person, return_inverse=True, return_counts=True)[1:]
    # A person with many photos is found more easily, and would count many times
    once = (np.bincount(who, first) / count).mean()
    return {'rank1': float(first.mean(dtype=float)),
            'rank1_ci': interval(first, person), 'each_person_once': float(once),
            'chance': float(chance.mean(dtype=float)), 'probes': len(first),
            'people': len(count), 'ceiling': rank1(ceilings)}

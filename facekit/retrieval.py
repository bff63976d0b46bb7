"""Retrieval: how often a probe finds what it was made from among all originals, exactly.

Two questions are asked of every attack, each with its chance level and its ceiling (originals as
probes). *same_image*: is the very original first? *same_person*: is another photo of the same
person first?
"""
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F

from facekit import verification
from facekit.batches import dealt

BLOCK = 16384        # gallery items whose scores are in memory at a time
PROBES = 512         # probes that are ranked at a time


@dataclass
class Search:
    """Probes and a gallery, compared by inner product."""
    probes: torch.Tensor               # float32 (n, d)
    gallery: torch.Tensor              # float32 (N, d); may lie on the host, probes on the device
    source: np.ndarray                 # int64 (n,): gallery item that each probe was made from
    person: np.ndarray | None          # int64 (N,): whose item; None = each item is one person
    ceiling_probes: torch.Tensor | None = None   # originals as probes; None = gallery[source]
    embeddings: bool = True            # whether both are unit vectors that a net or pixels gave
    centre: torch.Tensor | None = None     # float32 (d,): see taken()

    def compares_images(self):
        """Whether probes and gallery are unit vectors of single images, so that scores are
        cosines."""
        return self.embeddings and self.person is not None

    def centred(self):
        """The same without the mean embedding of each side, which costs an attacker nothing.

        A distortion moves all images in one direction, behind which a recogniser otherwise loses
        much of what it sees: of a blur or noise a third and more.
        """
        def away(z):
            return None if z is None else F.normalize(z - z.mean(0))

        return replace(self, probes=away(self.probes), centre=self.gallery.mean(0),
                       ceiling_probes=away(self.ceiling_probes))


@dataclass
class Attack:
    """What one attacker tries on one group."""
    ways: dict                 # {name: Search}, with all it has; of these the best counts
    # {series: {x: Search}}: the same with more or less effort, x = a number or a name
    curves: dict = field(default_factory=dict)


@dataclass
class Ranking:
    """How m probes fare, float32 or int64 (m,) each, on the CPU."""
    first: torch.Tensor        # how likely a target comes first: 0 or 1, or its share of a tie
    chance: torch.Tensor       # the same by guessing
    probe: torch.Tensor        # int64: which probe


# -------------------------------------------------------------------------------- search

def taken(gallery, some, device, centre=None):
    """Rows of a gallery (N, d) on the device; where a centre (d,) is taken from them, as unit
    vectors again. So no second gallery is in memory."""
    rows = gallery[some].to(device, non_blocking=True)
    return rows if centre is None else F.normalize(rows - centre.to(device), dim=-1)


def search(probes, gallery, probe_ids, gallery_ids, exclude=None, block=BLOCK, centre=None):
    """Find out which probes find a target first, exactly and in bounded memory.

    probes (n, d), gallery (N, d): float32; ids int64, with probes: the items with the probe's id
    are its targets, except item exclude[i]. The gallery may lie on the host; each process takes a
    share of the probes. Returns the Ranking of the probes that have a target. centre: see taken().
    """
    order = gallery_ids.argsort(stable=True)
    first = torch.searchsorted(gallery_ids[order], probe_ids)
    end = torch.searchsorted(gallery_ids[order], probe_ids, right=True)
    widest = int((end - first).max())
    shares = torch.arange(len(probes), device=probes.device).split(PROBES)

    def ranked(number):
        part = shares[number]
        slot = first[part, None] + torch.arange(widest, device=probes.device)        # (b, m)
        target, valid = order[slot.clamp(max=len(order) - 1)], slot < end[part, None]
        if exclude is not None:
            valid &= target != exclude[part, None]
        part, target, valid = (t[valid.any(1)] for t in (part, target, valid))
        same = probe_ids[part, None], gallery_ids[None]
        found = find(probes[part], gallery, target, valid, same, block, centre)
        chance = valid.sum(1) / (len(gallery) - (exclude is not None))
        return [t.cpu() for t in (found, chance, part)]

    return Ranking(*(torch.cat(x) for x in zip(*dealt(len(shares), ranked))))


def find(probes, gallery, target, valid, same, block, centre):
    """How likely a target comes first where ties are drawn by lot, float32 (b,).

    target, valid (b, m): gallery items to find, and which of the m count; same: ids (b, 1) and
    (1, N), equal where an item is no distractor.
    """
    device = probes.device
    wanted = torch.cat([
        exact(probes[:, None], taken(gallery, some.to(gallery.device), device, centre))
        for some in target.split(32, 1)], 1).masked_fill(~valid, -torch.inf)
    best = wanted.amax(1, keepdim=True)
    above, tied = torch.zeros(2, len(probes), device=device)
    for begin in range(0, len(gallery), block):
        some = slice(begin, begin + block)
        rows = taken(gallery, some, device, centre)
        more, equal = compared(probes, rows, best, same[0] == same[1][:, some])
        above += more
        tied += equal
    targets = (wanted == best).sum(1)
    return torch.where(above == 0, targets / (targets + tied), 0)


def compared(probes, rows, best, same):
    """How many `rows` (N, d) have an exact() score above best (b, 1), and how many an equal one:
    int64 (b,) twice; same (b, N): which do not count.

    A product in float32 decides, and float64 where that could be wrong: it is slow on most GPUs.
    """
    score = (probes @ rows.T).masked_fill(same, -torch.inf)
    # Twice what rounding can change in a sum of d products
    doubt = (probes.shape[1] * torch.finfo(torch.float32).eps
             * probes.norm(dim=1, keepdim=True) * rows.norm(dim=1).amax())
    close = ((score - best).abs() <= doubt).nonzero()
    for some in close.split(16384):
        probe, row = some.unbind(1)
        score[probe, row] = exact(probes[probe], rows[row])
    return (score > best).sum(1), (score == best).sum(1)


def exact(a, b):
    """Inner products of rows of float32 tensors (..., d), summed in float64, rounded to float32.

    So that equal vectors get equal scores, in whatever block they stand: in float32 the order of a
    sum, and with it the last bit, depends on the shapes, and rounding would decide ties.
    """
    return (a.double() * b.double()).sum(-1).float()


# ------------------------------------------------------------------------------- figures

def questions(s):
    """{kind: (probe ids, gallery ids, excluded items)} of a Search, as tensors."""
    device = s.probes.device
    source = torch.as_tensor(s.source, device=device)
    numbers = torch.arange(len(s.gallery), device=device)
    if s.person is None:
        return {'same_person': (source, numbers, None)}
    person = torch.as_tensor(s.person, device=device)
    return {'same_image': (source, numbers, None),
            'same_person': (person[source], person, source)}


def figures_of(attacks):
    """One attacker's Attacks on all groups, pooled: {kind: figures of results.json}.

    Embeddings are compared as they are and centred; each question takes the way that finds most.
    """
    results = {}
    for name in attacks[0].ways:
        for suffix, searches in centrings([attack.ways[name] for attack in attacks]).items():
            for kind, figures in pooled(searches).items():
                if kind not in results or figures['rank1'] > results[kind]['rank1']:
                    results[kind] = figures | {'way': name + suffix}
    for kind in results:
        if curves := curves_of(attacks, kind):
            results[kind]['curve'] = curves
    return results


def centrings(searches):
    """{'': the Searches of all groups, ', centred': the same centred, if they are embeddings}."""
    if not all(s.embeddings for s in searches):
        return {'': searches}
    return {'': searches, ', centred': [s.centred() for s in searches]}


def pooled(searches):
    """Searches of all groups as one: {kind: figures}."""
    rankings, ceilings, people, offset = {}, {}, {}, 0
    for s in searches:
        perfect = s.ceiling_probes
        if perfect is None:
            perfect = taken(s.gallery, torch.as_tensor(s.source), s.probes.device, s.centre)
        # Without person, numbers of another group are other people
        names = s.source + offset if s.person is None else s.person[s.source]
        offset += len(s.gallery)
        for kind, question in questions(s).items():
            ranking = search(s.probes, s.gallery, *question, centre=s.centre)
            if len(ranking.first):
                rankings.setdefault(kind, []).append(ranking)
                ceilings.setdefault(kind, []).append(
                    search(perfect, s.gallery, *question, centre=s.centre))
                people.setdefault(kind, []).append(names[ranking.probe.numpy()])
    return {kind: summary(rankings[kind], ceilings[kind], np.concatenate(people[kind]))
            for kind in rankings}


def summary(rankings, ceilings, person):
    """Pooled Rankings, and those of originals as probes, as figures; person (m,) of each probe."""
    first, chance = (torch.cat([getattr(r, name) for r in rankings]).numpy()
                     for name in ('first', 'chance'))
    who, count = np.unique(person, return_inverse=True, return_counts=True)[1:]
    # A person with many photos is found more easily, and would count many times
    once = (np.bincount(who, first) / count).mean()
    return {'rank1': float(first.mean(dtype=float)),
            'rank1_ci': verification.interval(first, person), 'each_person_once': float(once),
            'chance': float(chance.mean(dtype=float)), 'probes': len(first),
            'people': len(count), 'ceiling': rank1(ceilings)}


def rank1(rankings):
    """Share of probes whose best target comes first, over several Rankings."""
    return torch.cat([r.first for r in rankings]).mean(dtype=torch.float64).item()


def curves_of(attacks, kind):
    """{series: {x: rank 1}} of the curves of Attacks that all groups have."""
    curves = {}
    for series, searches in attacks[0].curves.items():
        for x in searches:
            points = [s for s in (attack.curves[series][x] for attack in attacks)
                      if kind in questions(s)]
            if points:
                curves.setdefault(series, {})[str(x)] = max(
                    rank1([search(s.probes, s.gallery, *questions(s)[kind], centre=s.centre)
                           for s in some]) for some in centrings(points).values())
    return curves


@dataclass
class Cosines:
    """What a recogniser says of the pairs (probe, original)."""
    true: np.ndarray           # float32 (n,): of each probe and its own original
    others: np.ndarray         # float32 (n,): of each probe and an original of another person


def cosines_of(attacks):
    """The Cosines of one attacker's Attacks on all groups, or None if they do not compare single
    images."""
    values = {'true': [], 'others': []}
    for attack in attacks:
        s, rng = next(iter(attack.ways.values())), np.random.default_rng(0)
        if not s.compares_images() or len(np.unique(s.person)) < 2:
            return None
        other = verification.of_others(s.person, s.source, rng)
        true, others = (
            (s.probes * s.gallery[torch.as_tensor(rows)].to(s.probes.device)).sum(1).cpu().numpy()
            for rows in (s.source, other))
        values['true'].append(true)
        values['others'].append(others)
    return Cosines(*(np.concatenate(x) for x in values.values()))

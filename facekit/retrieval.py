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
    centre: torch.Tensor | None = None     # float32 (d,): see taken()
    ceiling_probes: torch.Tensor | None = None   # originals as probes; None = gallery[source]

    def compares_images(self):
        """Whether probes and gallery are unit vectors of single images, so that scores are
        cosines."""
        return self.ceiling_probes is None and self.person is not None

    def centred(self):
        """The same without the mean embedding of each side, which costs an attacker nothing.

        A distortion moves all images in one direction, behind which a recogniser otherwise loses
        much of what it sees: of a blur or noise a third and more.
        """
        return replace(self, probes=F.normalize(self.probes - self.probes.mean(0)),
                       centre=self.gallery.mean(0))


@dataclass
class Attack:
    """What one attacker tries on one group."""
    headline: Search
    # {series: {x: Search}}: the same with more or less effort, x = a number or a name
    curves: dict = field(default_factory=dict)


@dataclass
class Ranking:
    """Where m probes find their targets, float32 or int64 (m,) each, on the CPU."""
    rank: torch.Tensor         # of the best target, 1 = first; ties share the middle
    precision: torch.Tensor    # average precision over all targets, 0..1
    chance: torch.Tensor       # of rank 1 by guessing
    probe: torch.Tensor        # int64: which probe


# -------------------------------------------------------------------------------- search

def taken(gallery, some, device, centre=None):
    """Rows of a gallery (N, d) on the device; where a centre (d,) is taken from them, as unit
    vectors again. So no second gallery is in memory."""
    rows = gallery[some].to(device, non_blocking=True)
    return rows if centre is None else F.normalize(rows - centre.to(device), dim=-1)


def search(probes, gallery, probe_ids, gallery_ids, exclude=None, block=BLOCK, only_best=False,
           centre=None):
    """Rank every gallery item that a probe should find, exactly and in bounded memory.

    probes (n, d), gallery (N, d): float32; ids int64, with probes: the items with the probe's id
    are its targets, except item exclude[i]. The gallery may lie on the host; each process ranks a
    share of the probes. Returns the Ranking of the probes that have a target; with `only_best`,
    which is cheaper, without precision. centre: see taken().
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
        rank, precision = rank_targets(probes[part], gallery, target, valid, same, block,
                                       only_best, centre)
        chance = valid.sum(1) / (len(gallery) - (exclude is not None))
        return [t.cpu() for t in (rank, precision, chance, part)]

    return Ranking(*(torch.cat(x) for x in zip(*dealt(len(shares), ranked))))


def rank_targets(probes, gallery, target, valid, same, block, only_best, centre):
    """Rank of the best target and average precision, float32 (b,) each.

    target, valid (b, m): gallery items to find, and which of the m count; same: ids (b, 1) and
    (1, N), equal where an item is no distractor; with `only_best`, of the m the best is looked at
    alone.
    """
    device = probes.device
    wanted = torch.cat([
        scores(probes[:, None], taken(gallery, some.to(gallery.device), device, centre).mT
               ).squeeze(1) for some in target.split(32, 1)], 1)
    if only_best:
        wanted = wanted.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
        valid = valid.any(1, keepdim=True)
    targets = valid.shape[1]
    # Rising order for searchsorted; what does not count comes last and is never reached
    wanted = wanted.masked_fill(~valid, torch.inf).sort(1).values
    above = torch.zeros(len(probes), targets + 1, device=device)
    for begin in range(0, len(gallery), block):
        some = slice(begin, begin + block)
        score = scores(probes, taken(gallery, some, device, centre).T)
        score[same[0] == same[1][:, some]] = -torch.inf
        for side in (False, True):                # counting ties half below and half above
            place = torch.searchsorted(wanted, score, right=side)
            above.scatter_add_(1, place, torch.full_like(score, 0.5))
    # A distractor at place p is ahead of the p lowest targets
    ahead = above.flip(1).cumsum(1).flip(1)[:, 1:]                                   # (b, m)
    count = valid.sum(1, keepdim=True)
    among_targets = count - torch.arange(targets, device=device)             # place, best = 1
    rank = among_targets + ahead
    precision = torch.where(among_targets > 0, among_targets / rank, 0).sum(1) / count[:, 0]
    return rank.gather(1, count - 1)[:, 0], precision


def scores(a, b):
    """Matrix product of float32 tensors, summed in float64 and rounded to float32.

    So that equal vectors get equal scores, in whatever product and block they stand: in float32
    the order of a sum, and with it the last bit, depends on the shapes, and rounding would decide
    ties.
    """
    return (a.double() @ b.double()).float()


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

    Embeddings are compared as they are and centred; each question takes what finds more.
    """
    results, *centred = map(pooled, ways([attack.headline for attack in attacks]))
    for found in centred:
        for kind, figures in found.items():
            better = figures['rank1'] > results[kind]['rank1']
            results[kind] = (figures if better else results[kind]) | {'centred': better}
    for kind in results:
        if curves := curves_of(attacks, kind):
            results[kind]['curve'] = curves
    return results


def ways(searches):
    """The Searches of all groups as they are and, where they compare embeddings, centred."""
    if any(s.ceiling_probes is not None for s in searches):
        return [searches]
    return [searches, [s.centred() for s in searches]]


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
            if len(ranking.rank):
                rankings.setdefault(kind, []).append(ranking)
                ceilings.setdefault(kind, []).append(
                    search(perfect, s.gallery, *question, only_best=True, centre=s.centre))
                people.setdefault(kind, []).append(names[ranking.probe.numpy()])
    return {kind: summary(rankings[kind], ceilings[kind], np.concatenate(people[kind]))
            for kind in rankings}


def summary(rankings, ceilings, person):
    """Pooled Rankings, and those of originals as probes, as figures; person (m,) of each probe."""
    rank, precision, chance = (torch.cat([getattr(r, name) for r in rankings])
                               for name in ('rank', 'precision', 'chance'))
    hits = (rank <= 1).float()
    who, count = np.unique(person, return_inverse=True, return_counts=True)[1:]
    # A person with many photos is found more easily, and would count many times
    once = (np.bincount(who, hits) / count).mean()
    return {'rank1': hits.mean().item(), 'rank1_ci': verification.interval(hits.numpy(), person),
            'each_person_once': float(once),
            'rank5': (rank <= 5).float().mean().item(),
            'rank20': (rank <= 20).float().mean().item(), 'map': precision.mean().item(),
            'chance': chance.mean().item(), 'probes': len(rank), 'people': len(np.unique(person)),
            'ceiling': rank1(ceilings)}


def rank1(rankings):
    """Share of probes whose best target comes first, over several Rankings."""
    return (torch.cat([r.rank for r in rankings]) <= 1).float().mean().item()


def curves_of(attacks, kind):
    """{series: {x: rank 1}} of the curves of Attacks that all groups have."""
    curves = {}
    for series, searches in attacks[0].curves.items():
        for x in searches:
            points = [s for s in (attack.curves[series][x] for attack in attacks)
                      if kind in questions(s)]
            if points:
                curves.setdefault(series, {})[str(x)] = max(
                    rank1([search(s.probes, s.gallery, *questions(s)[kind], only_best=True,
                                  centre=s.centre) for s in some]) for some in ways(points))
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
        s, rng = attack.headline, np.random.default_rng(0)
        if not s.compares_images() or len(np.unique(s.person)) < 2:
            return None
        other = verification.of_others(s.person, s.source, rng)
        true, others = (
            (s.probes * s.gallery[torch.as_tensor(rows)].to(s.probes.device)).sum(1).cpu().numpy()
            for rows in (s.source, other))
        values['true'].append(true)
        values['others'].append(others)
    return Cosines(*(np.concatenate(x) for x in values.values()))

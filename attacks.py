"""Privacy attackers: how often the original behind a released image is found.

Retrieval: the probes are released images, the gallery is all private originals of their fold.
*Same image* asks for the source of a released image, *same person* for another photo of its person.
Each comes with its chance level and its ceiling, the originals as probes.
"""
import numpy as np
import torch
import torch.nn.functional as F


def search(probes, gallery, probe_ids, gallery_ids, exclude=None, block=16384):
    """Rank every gallery item that a probe should find, exactly and in bounded memory.

    probes (n, d), gallery (N, d): unit float32; ids int64: those with the probe's id are to be
    found, except row exclude[i]. Returns for each probe that has any: the rank of its best one
    (1 = first; ties share the middle), its average precision, and its chance of a hit at rank 1.
    """
    device = gallery.device
    order = gallery_ids.argsort(stable=True)
    left = torch.searchsorted(gallery_ids[order], probe_ids)
    right = torch.searchsorted(gallery_ids[order], probe_ids, right=True)
    widest = int((right - left).max())
    results = []
    for part in torch.arange(len(probes), device=device).split(512):
        slot = left[part, None] + torch.arange(widest, device=device)            # (b, m)
        found = order[slot.clamp(max=len(order) - 1)]
        valid = slot < right[part, None]
        if exclude is not None:
            valid &= found != exclude[part, None]
        part, found, valid = (t[valid.any(1)] for t in (part, found, valid))
        z = probes[part]
        wanted = torch.einsum('bd,bmd->bm', z, gallery[found])
        # Rising order for searchsorted; the padding comes last and is never counted
        wanted = wanted.masked_fill(~valid, torch.inf).sort(1).values
        above = torch.zeros(len(part), widest + 1, device=device)
        for begin in range(0, len(gallery), block):
            score = z @ gallery[begin:begin + block].T
            score[probe_ids[part, None] == gallery_ids[None, begin:begin + block]] = -torch.inf
            for side in (False, True):            # counting ties once below and once above
                place = torch.searchsorted(wanted, score, right=side)
                above.scatter_add_(1, place, torch.full_like(score, 0.5))
        # A distractor at place p beats the p lowest of the wanted
        beaten_by = above.flip(1).cumsum(1).flip(1)[:, 1:]                        # (b, m)
        count = valid.sum(1, keepdim=True)
        own = count - torch.arange(widest, device=device)        # place among the wanted, best = 1
        rank = own + beaten_by
        precision = torch.where(own > 0, own / rank, 0).sum(1) / count[:, 0]
        best = rank.gather(1, count - 1)[:, 0]
        others = len(gallery) - (exclude is not None)
        results.append(torch.stack([best, precision, count[:, 0] / others], 1))
    return torch.cat(results).cpu()


def summary(found, ceiling):
    """Retrieval results (n, 3) of search() as the figures of results.json."""
    best = found[:, 0]
    return {'rank1': (best <= 1).float().mean().item(), 'rank5': (best <= 5).float().mean().item(),
            'rank20': (best <= 20).float().mean().item(), 'map': found[:, 1].mean().item(),
            'chance': found[:, 2].mean().item(), 'probes': len(found),
            'ceiling': (ceiling[:, 0] <= 1).float().mean().item()}


def pixel_embeddings(images, chosen, device):
    """16 x 16 pixels of uint8 images[chosen], contrast-normalised, as unit vectors (N, 768)."""
    small = []
    for part in np.array_split(chosen, len(chosen) // 4096 + 1):
        x = torch.from_numpy(images[part]).to(device).permute(0, 3, 1, 2).float()
        x = F.adaptive_avg_pool2d(x, 16).flatten(2)
        small.append(F.normalize((x - x.mean(2, keepdim=True)).flatten(1)))
    return torch.cat(small)


def leakage(groups, attackers, galleries, device):
    """Retrieval under each attacker, pooled over the folds: {attack: figures of summary()}.

    groups, one for each fold: `released` and `originals` as (images, rows), `source` position of
    each released image's original among the originals, `person` of each original. attackers:
    {name: [(key, embedder(images, rows) -> unit vectors) of each fold]}. `galleries` keeps the
    embedded originals by key, because the rows of a comparison share judge and pixels.
    """
    results = {}
    for name, embedders in attackers.items():
        found = {'same_image': [], 'same_person': []}
        ceiling = {'same_image': [], 'same_person': []}
        for (key, embedder), group in zip(embedders, groups, strict=True):
            if not len(group.source):
                continue
            if key not in galleries:
                galleries[key] = embedder(*group.originals)
            gallery = galleries[key]
            source = torch.as_tensor(group.source, device=device)
            person = torch.as_tensor(group.person, device=device)
            numbers = torch.arange(len(gallery), device=device)
            for probes, kept in ((embedder(*group.released), found), (gallery[source], ceiling)):
                kept['same_image'].append(search(probes, gallery, source, numbers))
                kept['same_person'].append(search(probes, gallery, person[source], person, source))
        for kind in found:
            if not sum(map(len, found[kind])):            # everybody has a single image
                continue
            results[f'{name}_{kind}'] = summary(torch.cat(found[kind]), torch.cat(ceiling[kind]))
    return results

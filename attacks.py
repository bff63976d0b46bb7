"""Privacy attackers: who finds the original behind a released image, and how often.

Retrieval: the probes are released images, the gallery is all private originals of their group (a
fold of the cross-fit). *Same image* asks for the source of a released image, *same person* for
another photo of its person. Each comes with its chance level and its ceiling, the originals as
probes. An attack takes a group and returns {variant: task}; variant '' is its headline and first,
the others are pairs (series, x).

A group is a namespace: `released` and `originals` as (images, rows), `source` position of each
released image's original among the originals, `person` of each original, and what an attacker
may have: `pair_people` (M,) and `pairs(chosen, seed)`, uint8 batches of protected images of other
people and of their originals; `again(seed)`, the released images made once more with other masks
(None if the method draws nothing); `hidden` (n, L), 1 where a patch was masked, or None;
`outsiders`, (images, rows) of people in no training, or None; `seen`, a dict for embeddings.
"""
import copy
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import repeat

import embed
import runtime
import verification


# -------------------------------------------------------------------------------- search

def search(probes, gallery, probe_ids, gallery_ids, exclude=None, block=16384):
    """Rank every gallery item that a probe should find, exactly and in bounded memory.

    probes (n, d), gallery (N, d): float32, compared by inner product; ids int64: those with the
    probe's id are to be found, except row exclude[i]. Returns for each probe that has any: the
    rank of its best one (1 = first; ties share the middle), its average precision, its chance of
    a hit at rank 1, and its number among the probes, float32 (m, 4).
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
        results.append(torch.stack([best, precision, count[:, 0] / others, part], 1))
    return torch.cat(results).cpu()


def summary(found, ceiling, person):
    """Retrieval results (n, 4) of search() as the figures of results.json; person (n,)."""
    best = found[:, 0]
    return {'rank1': (best <= 1).float().mean().item(),
            'rank1_ci': verification.interval((best <= 1).numpy(), person),
            'rank5': (best <= 5).float().mean().item(),
            'rank20': (best <= 20).float().mean().item(), 'map': found[:, 1].mean().item(),
            'chance': found[:, 2].mean().item(), 'probes': len(found),
            'people': len(np.unique(person)),
            'ceiling': (ceiling[:, 0] <= 1).float().mean().item()}


def retrieve(task, device):
    """search() for both kinds: (kind, found, ceiling, person of each row of found)."""
    source = torch.as_tensor(task.source, device=device)
    numbers = torch.arange(len(task.gallery), device=device)
    own = task.gallery[source] if task.ceiling is None else task.ceiling
    questions = {'same_person': (source, numbers, None)}           # a gallery of whole people
    if task.person is not None:
        person = torch.as_tensor(task.person, device=device)
        questions = {'same_image': (source, numbers, None),
                     'same_person': (person[source], person, source)}
    names = source.cpu().numpy() if task.person is None else task.person[task.source]
    for kind, question in questions.items():
        found = search(task.probes, task.gallery, *question)
        if len(found):                                            # not if all have a single image
            yield (kind, found, search(own, task.gallery, *question),
                   names[found[:, 3].long().numpy()])


def leakage(groups, attackers, device):
    """Retrieval under each attacker, pooled over the groups.

    attackers: {name: [attack of each group]}. Returns {name_kind: figures of summary(), `curve` =
    rank-1 of the other variants (series, x), for recognisers `tar@far=1e-3`}, and {name: cosines
    of all true pairs and of as many false ones} of the attacks that compare unit vectors.
    """
    results, cosines = {}, {}
    for name, attacks in attackers.items():
        pooled, scores = {}, []
        for attack, group in zip(attacks, groups, strict=True):
            for variant, t in attack(group).items() if len(group.source) else ():
                for kind, *entry in retrieve(t, device):
                    pooled.setdefault((variant, kind), []).append(entry)
                if variant == '' and t.ceiling is None and t.person is not None:
                    pairs = (t.source, np.roll(t.source, len(t.source) // 2))   # other people
                    true, false = ((t.probes * t.gallery[s]).sum(1).cpu().numpy() for s in pairs)
                    scores.append((true, false, true > t.threshold))
        for (variant, kind), entries in pooled.items():
            figures = summary(torch.cat([e[0] for e in entries]), torch.cat(
                [e[1] for e in entries]), np.concatenate([e[2] for e in entries]))
            if variant:
                series, x = variant
                curve = results[f'{name}_{kind}'].setdefault('curve', {}).setdefault(series, {})
                curve[str(x)] = figures['rank1']
            else:
                results[f'{name}_{kind}'] = figures
        if scores:
            *cosines[name], accepted = (np.concatenate(x) for x in zip(*scores))
            if np.isfinite(t.threshold):
                results[f'{name}_same_image']['tar@far=1e-3'] = accepted.mean().item()
    return results, cosines


# ------------------------------------------------------------------------------- attacks

def task(group, probes, gallery, threshold=np.inf, ceiling=None):
    """What leakage() searches: unit vectors, or others that bring the probes of their ceiling."""
    return SimpleNamespace(probes=probes, gallery=gallery, source=group.source,
                           person=group.person, threshold=threshold, ceiling=ceiling)


def view(eye, group, side):
    """Unit embeddings of a group's `released` or `originals`, made once.

    An eye is a namespace: `embed(images, rows)`, `key` that tells it from others, `seen` where its
    galleries are kept over the rows of a comparison, `threshold` (a cosine), `net` if it has one.
    """
    memory = group.seen if side == 'released' else eye.seen
    if (eye.key, side) not in memory:
        memory[eye.key, side] = eye.embed(*getattr(group, side))
    return memory[eye.key, side]


def pixel_embeddings(images, chosen, device):
    """16 x 16 pixels of uint8 images[chosen], contrast-normalised, as unit vectors (N, 768)."""
    small = []
    for part in torch.as_tensor(chosen).split(4096):
        x = torch.as_tensor(images[part]).to(device).permute(0, 3, 1, 2).float()
        x = F.adaptive_avg_pool2d(x, 16).flatten(2)
        small.append(F.normalize((x - x.mean(2, keepdim=True)).flatten(1)))
    return torch.cat(small)


def stock(eye, group):
    """Nearest original as the eye sees it."""
    return {'': task(group, view(eye, group, 'released'), view(eye, group, 'originals'),
                     eye.threshold)}


def cells(images, rows, side, device):
    """Mean colour of side x side cells in 0..1, (n, 3, side, side), and a guess of how visible
    they are (n, 1, side, side): their variance v, as v / (v + its mean over the image)."""
    colour, visible = [], []
    for part in torch.as_tensor(rows).split(1024):
        x = torch.as_tensor(images[part]).to(device).permute(0, 3, 1, 2).float() / 255
        mean, square = (F.adaptive_avg_pool2d(t, side) for t in (x, x.square()))
        v = (square - mean.square()).mean(1, keepdim=True).clamp(min=0)
        colour.append(mean)
        visible.append(v / (v + v.mean((2, 3), keepdim=True) + 1e-8))
    return torch.cat(colour), torch.cat(visible)


def patchwork(group, device, original=False):
    """Nearest original in the visible patches, two by two cells each: the attacker who knows the
    mask and, as a variant, the one who takes detailed regions for visible. `original` has the
    visible patches of the original image instead of what was released."""
    if original and group.hidden is None:
        return {}
    side = 32 if group.hidden is None else 2 * round(group.hidden.shape[1] ** 0.5)
    theirs = cells(*group.originals, side, device)[0]
    mine = theirs[group.source]
    a, guess = (mine, None) if original else cells(*group.released, side, device)
    known = torch.ones_like(a[:, :1])
    if group.hidden is not None:
        known = repeat(1 - group.hidden.to(device), 'n (h w) -> n 1 (h p) (w q)', h=side // 2,
                       p=2, q=2)
    # -sum w (a - b)^2 up to what does not depend on b, as an inner product
    gallery = torch.cat([theirs, theirs.square()], 1).flatten(1)

    def query(x, w):
        return torch.cat([2 * w * x, -w.expand_as(x)], 1).flatten(1)

    found = {'': task(group, query(a, known), gallery, ceiling=query(mine, known))}
    if not original:
        found['mask', 'estimated'] = task(group, query(a, guess), gallery,
                                       ceiling=query(mine, guess))
    return found


def procrustes(x, y):
    """The rotation or reflection (d, d) that takes x (n, d) nearest to y (n, d)."""
    u, _, v = torch.linalg.svd(x.T @ y)
    return u @ v


def ridge(x, y):
    """The linear map (d, d) from x (n, d) to y (n, d) with the least leave-one-out error."""
    s, v = torch.linalg.eigh(x.T @ x)
    s, turned, best = s.clamp(min=0), x @ v, (torch.inf, None)
    for strength in 10.0 ** torch.arange(-4, 4):
        shrunk = turned / (s + strength * s.mean())                              # (n, d)
        map_ = v @ (shrunk.T @ y)
        left_out = (y - x @ map_) / (1 - (turned * shrunk).sum(1, keepdim=True)).clamp(min=1e-6)
        if (error := left_out.square().mean().item()) < best[0]:
            best = error, map_
    return best[1]


def linear(eye, group):
    """A linear map from released to original embeddings, fitted to n pairs of other people."""
    if ('pairs', eye.key) not in group.seen:
        parts = [[eye.embed(x, range(len(x))) for x in group.pairs(chosen, 1)]
                 for chosen in np.array_split(np.arange(len(group.pair_people)),
                                              len(group.pair_people) // 2048 + 1)]
        group.seen['pairs', eye.key] = [torch.cat(x).double() for x in zip(*parts)]
    x, y = group.seen['pairs', eye.key]
    probes, gallery = (view(eye, group, side).double() for side in ('released', 'originals'))
    found, sizes = {}, [n for n in (16, 64, 256, 1024, 4096, 16384) if n < len(x)] + [len(x)]
    for n in sizes[::-1]:
        centre, target = x[:n].mean(0), y[:n].mean(0)
        for name, fit in (('ridge', ridge), ('rotation', procrustes)):
            map_ = fit(x[:n] - centre, y[:n] - target)
            found[name, n] = task(
                group, F.normalize((probes - centre) @ map_).float(),
                F.normalize(gallery - target).float())
    return {'': next(iter(found.values())), **found}


def trained(eye, group, cfg, device):
    """A copy of the recogniser, trained to see a protected image and its original alike.

    Others' pairs, fresh masks, InfoNCE (arXiv 1807.03748, eq. 4) both ways; unscaled: no fp16.
    """
    torch.manual_seed(0)
    steps = cfg.evaluate.attack_steps
    net = copy.deepcopy(eye.net).train()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    rng, size = np.random.default_rng(0), min(128, len(group.pair_people))
    for step in range(steps):
        chosen = rng.choice(len(group.pair_people), size, replace=False)
        images = torch.cat([torch.as_tensor(x).to(device) for x in group.pairs(chosen, 2 + step)])
        flip = torch.rand(size, device=device).lt(0.5).repeat(2)
        images = torch.where(flip[:, None, None, None], images.flip(2), images)
        with runtime.autocast(device, cfg.run.precision.replace('fp16', 'fp32')):
            z = net(embed.for_recogniser(images, net))
        z, w = F.normalize(z.float()).chunk(2)
        right = torch.arange(size, device=device)
        loss = F.cross_entropy(16 * z @ w.T, right) + F.cross_entropy(16 * w @ z.T, right)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    for value in net.state_dict().values() if runtime.world() > 1 else ():
        dist.broadcast(value, 0)                  # GPUs may have rounded differently
    probes, gallery = (verification.unit_embeddings(net.eval(), *getattr(group, side), cfg, device)
                       for side in ('released', 'originals'))
    return {'': task(group, probes, gallery)}


def by_class(eyes, group):
    """The mean of a person's released images against the means of people's originals."""
    people, index = np.unique(group.person, return_inverse=True)
    released, asked = np.unique(index[group.source], return_inverse=True)

    def means(z, index):
        total = torch.zeros(int(index.max()) + 1, z.shape[1], device=z.device)
        return F.normalize(total.index_add_(0, torch.as_tensor(index, device=z.device), z))

    classes = SimpleNamespace(source=released, person=None)
    return {variant: task(classes, means(view(eye, group, 'released'), asked),
                          means(view(eye, group, 'originals'), index))
            for variant, eye in zip(('', ('seen by', 'pixels')), eyes)}


def repeated(eyes, group):
    """The mean embedding of k releases of each image under different masks."""
    if not group.again:
        return {}
    found = {}
    for eye, name in zip(eyes, ('recogniser', 'pixels')):
        total = view(eye, group, 'released').clone()
        for k in range(1, 9):
            if k in (1, 2, 4, 8):
                found[name, k] = task(group, F.normalize(total), view(eye, group, 'originals'))
            if k < 8:
                made = group.again(10**6 + k)
                total += eye.embed(made, range(len(made)))
    return {'': found['recogniser', 8], **found}


# ---------------------------------------------------------------------------- membership

def membership(members, others):
    """How well a score, higher for training images, tells them from others."""
    distance = -np.concatenate([members, others])
    same = np.arange(len(distance)) < len(members)
    return {'auc': verification.auc(distance, same),
            'tpr@fpr=1e-2': verification.tar_at_far(distance, same, 1e-2),
            'members': len(members), 'others': len(others)}


def reconstruction_membership(groups):
    """Whether the model errs less on the public images that it was trained on than on private
    ones: minus the squared error of four masked reconstructions."""
    def score(made, originals):
        return -np.square(np.subtract(made, originals, dtype=np.float32)).mean((1, 2, 3))

    members, others = [], []
    for group in groups:
        images, rows = group.originals
        private, public = images[rows[group.source]], np.arange(len(group.pair_people))
        members.append(sum(score(*group.pairs(public, seed)) for seed in range(2, 6)))
        others.append(sum(score(group.again(seed), private) for seed in range(2, 6)))
    return membership(np.concatenate(members), np.concatenate(others))


def recogniser_membership(cosines, groups):
    """Whether the released recogniser is surer of the photos behind its training images than of
    other people's: the largest of cosines(images, rows) with the class centres."""
    members, others = ([cosines(images, rows).max(1).values.cpu().numpy()
                        for images, rows in chosen]
                       for chosen in ([g.originals for g in groups], [groups[0].outsiders]))
    return membership(np.concatenate(members), np.concatenate(others))

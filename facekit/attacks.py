"""Privacy attackers: who tries to find the original behind a released image, and how.

The probes are released images, the gallery is the private originals of their group (a fold of the
cross-fit). An attack takes an AttackGroup and what its attacker owns, and returns an Attack: the
Searches that its attacker can make, of which the best counts, and, where more or less effort is of
interest, named curves of further ones.
attack() at the end of this file tells who owns what.
"""
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import models
from facekit import batches, embed, files, run, verification
from facekit.embed import Embedder
from facekit.errors import InputError
from facekit.mask_attacks import Patches, patchwork
from facekit.published import is_published, refuse_published
from facekit.retrieval import Attack, Search

NAMES = ('judge', 'pixels', 'insider', 'masked', 'visible', 'linear', 'trained', 'class',
         'repeated', 'teacher', 'dlib', 'membership')


# ----------------------------------------------------- attackers without other people's pairs

def nearest(embedder, group):
    """The nearest original, as an Embedder sees both."""
    return Attack({'embeddings': Search(
        group.probe_embeddings(embedder), group.gallery_embeddings(embedder), group.source,
        group.person)})


def by_pixels(pixels, group, device):
    """The nearest original in small pixels; where patches may be hidden, also in those of a
    released image that look visible, which needs no more than a look."""
    ways = nearest(pixels, group).ways
    if group.hidden is not None or not group.protection:
        ways |= Patches(group, device).by_look()
    return Attack(ways)


def by_class(embedders, group):
    """The mean of a person's released images against the means of people's originals, as any of
    the embedders {name: Embedder} sees both.

    Half of a person's photos are searched for and the other half is held, so that a photo never
    helps to find itself.
    """
    order = np.argsort(group.person, kind='stable')
    held = np.empty(len(order), bool)
    held[order] = (np.arange(len(order)) - np.searchsorted(group.person[order],
                                                           group.person[order])) % 2 == 1
    everybody, index = np.unique(group.person[held], return_inverse=True)
    asked = ~held[group.source] & np.isin(group.person[group.source], everybody)
    if not asked.any():
        return None
    known, probe = np.unique(group.person[group.source[asked]], return_inverse=True)

    def means(z, chosen, index):
        z = z[torch.as_tensor(chosen, device=z.device)]
        total = torch.zeros(int(index.max()) + 1, z.shape[1], device=z.device)
        total.index_add_(0, torch.as_tensor(index, device=z.device), z)
        return F.normalize(total).to(group.device)

    def search(embedder):
        gallery = group.gallery_embeddings(embedder)
        return Search(means(group.probe_embeddings(embedder), asked, probe),
                      means(gallery, held, index), np.searchsorted(everybody, known), None,
                      ceiling_probes=means(gallery, group.source[asked], probe))

    return Attack({name: search(embedder) for name, embedder in embedders.items()})


def repeated(embedders, group):
    """The mean embedding of k releases of each image under different masks, as any of the
    embedders {name: Embedder} sees them."""
    if not group.is_random():
        return None
    curves = {}
    for name, embedder in embedders.items():
        total, curves[name] = group.probe_embeddings(embedder).clone(), {}
        for k in range(1, 9):
            if k in (1, 2, 4, 8):
                curves[name][k] = Search(F.normalize(total), group.gallery_embeddings(embedder),
                                         group.source, group.person)
            if k < 8:
                total += embedder.embed_images(group.released_with(10**6 + k)).to(total.device)
    return Attack({name: curve[8] for name, curve in curves.items()}, curves)


# -------------------------------------------------------- attackers with other people's pairs

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


def in_blocks(z, change, device):
    """change() of embeddings z (N, d), which may lie on the host, made block by block on the
    device: float32, where z lies."""
    return torch.cat([change(some.to(device)).float().to(z.device) for some in z.split(65536)])


def linear(judge, group):
    """A linear map from released to original embeddings, fitted to n pairs of other people."""
    count = len(group.pair_person)
    parts = [[judge.embed_images(images) for images in group.training_pairs(chosen, 1)]
             for chosen in np.array_split(np.arange(count), count // 2048 + 1)]
    x, y = (torch.cat(z).double() for z in zip(*parts))
    probes, gallery = group.probe_embeddings(judge), group.gallery_embeddings(judge)
    curves, sizes = {'ridge': {}, 'rotation': {}}, [16, 64, 256, 1024, 4096, 16384]
    for n in [count, *(n for n in sizes[::-1] if n < count)]:
        centre, target = x[:n].mean(0), y[:n].mean(0)
        originals = in_blocks(gallery, lambda z: F.normalize(z.double() - target), x.device)
        for name, fit in (('ridge', ridge), ('rotation', procrustes)):
            map_ = fit(x[:n] - centre, y[:n] - target)
            mapped = in_blocks(probes, lambda z: F.normalize((z.double() - centre) @ map_),
                               x.device)
            curves[name][n] = Search(mapped, originals, group.source, group.person)
    return Attack({name: curve[count] for name, curve in curves.items()}, curves)


def trained(judge, group, cfg, device):
    """A copy of the recogniser, trained to see a protected image and its original alike.

    Others' pairs, fresh masks, InfoNCE (arXiv 1807.03748, eq. 4) both ways; unscaled: no fp16.
    """
    torch.manual_seed(0)
    steps = cfg.evaluate.attack_steps
    net = copy.deepcopy(judge.net).train()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    rng, size = np.random.default_rng(0), min(128, len(group.pair_person))
    right = torch.arange(size, device=device)
    for step in range(steps):
        chosen = rng.choice(len(group.pair_person), size, replace=False)
        images = torch.cat([torch.as_tensor(x).to(device)
                            for x in group.training_pairs(chosen, 2 + step)])
        flip = torch.rand(size, device=device).lt(0.5).repeat(2)
        images = batches.flipped(images, flip)
        with run.autocast(device, cfg.run.precision.replace('fp16', 'fp32')):
            z = net(embed.for_recogniser(images, net))
        z, w = F.normalize(z.float()).chunk(2)
        loss = F.cross_entropy(16 * z @ w.T, right) + F.cross_entropy(16 * w @ z.T, right)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    run.agree_on(net)
    learnt = Embedder('trained', net.eval(), cfg, device)
    return nearest(learnt, group)


# ------------------------------------------------------------------- who owns which net

class Recognisers:
    """The recognisers that attackers of a run own, loaded once for all rows of a comparison.

    Those in the cache hold the embeddings of the originals, too, which are the same in all rows.
    """

    def __init__(self, cfg, folds, device):
        self.cfg, self.folds, self.device = cfg, folds, device
        self.cache = {}                 # (path or 'pixels', number of a group) -> Embedder

    def pixels(self, n):
        """The Embedder of plain pixels for group n."""
        new = Embedder('pixels', None, self.cfg, self.device)
        return self.cache.setdefault(('pixels', n), new)

    def public(self, role, n, path=''):
        """The Embedder of group n that was trained on public people: role is 'teacher' or
        'judge', unless a path is given."""
        fold = self.folds[n] if self.folds else None
        own = Path(self.cfg.run.folder, f'fold{fold.k if fold else 0}', f'{role}.pt')
        named = path or getattr(self.cfg, role).checkpoint
        path = str(named or own)
        if (path, n) not in self.cache:
            made_by = run.command('train_fr.py', f'stage={role}')
            if not is_published(path) and not Path(path).is_file():
                raise InputError(f'{path} is missing: first run `{made_by}`, or name the {role} '
                                 f'of another run by {role}.checkpoint=PATH')
            net = embed.recogniser(path, self.device, made_by, self.cfg.evaluate.onnx_pixels,
                                   None if named else fold)
            self.cache[path, n] = Embedder(path, net, self.cfg, self.device)
        return self.cache[path, n]


def attack(name, n, group, recognisers, insider, cfg, device):
    """The Attack of evaluate.attacks called `name` on group n, or None where it makes no sense.

    recognisers: Recognisers; insider: Embedder of the recogniser that was trained on the release,
    or None.
    """
    def everyone():
        """{name: Embedder} of all who see the release without others' pairs."""
        owned = {'recogniser': recognisers.public('judge', n), 'pixels': recognisers.pixels(n)}
        return owned | ({'insider': insider} if insider else {})

    match name:
        case 'judge':           # has a recogniser of other people
            return nearest(recognisers.public('judge', n), group)
        case 'teacher':         # has the very recogniser that shaped the release
            return nearest(recognisers.public('teacher', n, cfg.teacher.checkpoint), group)
        case 'pixels':          # has nothing
            return by_pixels(recognisers.pixels(n), group, device)
        case 'insider':         # trains a recogniser on the release
            return nearest(insider, group)
        case 'masked':          # knows the masks, or guesses them
            return patchwork(group, cfg, device)
        case 'visible':         # has the visible patches of the original itself
            return patchwork(group, cfg, device, original=True)
        case 'linear':          # has released images of other people and their originals
            return linear(recognisers.public('judge', n), group)
        case 'trained':         # the same, and trains on them
            return trained(recognisers.public('judge', n), group, cfg, device)
        case 'class':           # averages half of a label's images, holds the other half's photos
            return by_class(everyone(), group)
        case 'repeated':        # has eight releases of the same photos
            return repeated(everyone(), group)
    return nearest(recognisers.public('teacher', n, name), group)       # a backbone somewhere


def check_attacks(cfg):
    """Refuse names in evaluate.attacks that are no attack and no file, or that ask too much of the
    judge."""
    if 'trained' in cfg.evaluate.attacks:
        refuse_published(cfg.judge.checkpoint, 'the attack named trained trains the judge further')
    for name in cfg.evaluate.attacks:
        if name not in NAMES and not Path(name).is_file():
            raise InputError(f'evaluate.attacks has {name!r}: choose from {", ".join(NAMES)}, or '
                             'name an insightface backbone or an .onnx file')


def short_names(wanted):
    """{entry of evaluate.attacks: its name in tables}: of paths as little as tells them apart."""
    names = {}
    for entry in wanted:
        parts = Path(entry).with_suffix('').parts if Path(entry).is_file() else (entry,)
        for count in range(1, len(parts) + 1):
            name = '/'.join(parts[-count:])
            others = ['/'.join(Path(other).with_suffix('').parts[-count:])
                      for other in wanted if other != entry]
            if name not in others and (len(parts) == 1 or name not in NAMES):
                break
        names[entry] = name
    return names


# ---------------------------------------------------------------------------- membership

def membership(members, others):
    """How well a score (n,), higher for training images, tells them from others."""
    distance = -np.concatenate([members, others])
    same = np.arange(len(distance)) < len(members)
    return {'auc': verification.auc(distance, same),
            'tpr@fpr=1e-2': verification.tar_at_far(distance, same, 1e-2),
            'members': len(members), 'others': len(others)}


def reconstruction_membership(groups):
    """Whether the model errs less on the public images that it was trained on than on private
    ones of the same set: minus the squared error of four masked reconstructions."""
    def score(released, originals):
        return -np.square(np.subtract(released, originals, dtype=np.float32)).mean((1, 2, 3))

    members, others = [], []
    for group in groups:
        originals = group.sources().pixels()
        others.append(sum(score(group.released_with(seed), originals) for seed in range(2, 6)))
        blocks = np.array_split(np.arange(len(group.pair_person)),
                                len(group.pair_person) // 2048 + 1)
        members += [sum(score(*group.training_pairs(block, seed)) for seed in range(2, 6))
                    for block in blocks]
    return membership(np.concatenate(members), np.concatenate(others))


def recogniser_membership(embedder, centres, groups):
    """Whether the released recogniser is surer of the photos behind its training images than of
    other people's: the largest cosine with the class centres (C, d), unit vectors."""
    at_a_time = max(1, (1 << 28) // len(centres))         # images, whose cosines take 1 GiB

    def surest(chosen):
        return torch.cat([(part.to(centres.device) @ centres.T).amax(1).cpu()
                          for part in embedder.embed(chosen).split(at_a_time)]).numpy()

    members, others = ([surest(chosen) for chosen in sides]
                       for sides in ([g.sources() for g in groups], [groups[0].outsiders]))
    return membership(np.concatenate(members), np.concatenate(others))


def code_digest():
    """Hex digits of the code that the figures of an attack depend on."""
    here = Path(__file__).parent
    paths = [Path(models.__file__), *(here / f'{name}.py' for name in (
        'batches', 'faces', 'images', 'sources', 'split', 'published', 'embed', 'keys', 'protect',
        'verification', 'retrieval', 'attack_data', 'mask_attacks', 'attacks'))]
    return files.digest(b''.join(path.read_bytes() for path in paths))

"""Privacy attackers: who tries to find the original behind a released image, and how.

The probes are released images, the gallery is the private originals of their group (a fold of the
cross-fit). An attacker is a function (group, owned, cfg) and a line of ATTACKERS: the function
gets an AttackGroup, what its attackers own (Owned) and the config of the row, and returns the
searches that the attacker tries, {way: Search}, of which the best counts, or None where the attack
makes no sense.
"""
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import models
from facekit.base import files, process
from facekit.base.errors import InputError
from facekit.base.launch import provenance
from facekit.base.made_from import settings
from facekit.data import batches
from facekit.data.people import not_excluded
from facekit.measure import retrieval
from facekit.measure.retrieval import Search
from facekit.measure.statistics import auc, tar_at_far
from facekit.nets import embed
from facekit.nets.embed import Embedder
from facekit.nets.published import refuse_published, versions
from facekit.nets.weights import digest_of, load_checkpoint
from facekit.privacy.masks import Patches, guess, masked

# ------------------------------------------------------ attackers without pairs of others

def nearest(embedder, group):
    """The nearest original, as an Embedder sees both."""
    return {'embeddings': group.search(group.probe_embeddings(embedder),
                                       group.gallery_embeddings(embedder))}


def nearest_to(name):
    """The attacker who takes the nearest original, as the embedder of that name sees both."""
    def attacker(group, owned, cfg):
        embedder = owned.embedder(name)
        return nearest(embedder, group) if embedder else None
    return attacker


def pixels(group, owned, cfg):
    """The nearest original in small pixels; where patches may be hidden, also in those of a
    released image that look visible, which needs no more than a look."""
    ways = nearest(owned.embedder('pixels'), group)
    if group.hidden is not None or not group.protection:
        ways |= Patches(group).by_look()
    return ways


def by_label(group, owned, cfg):
    """The mean of a person's released images against the means of people's originals: one half of
    the photos is searched for in the other, so that none helps to find itself."""
    order = np.argsort(group.person, kind='stable')
    first = np.searchsorted(group.person[order], group.person[order])
    in_gallery = np.empty(len(order), bool)
    in_gallery[order] = (np.arange(len(order)) - first) % 2 == 1
    everybody, item = np.unique(group.person[in_gallery], return_inverse=True)
    asked = ~in_gallery[group.source] & np.isin(group.person[group.source], everybody)
    if not asked.any():
        return None
    people, probe = np.unique(group.person[group.source[asked]], return_inverse=True)

    def means(z, chosen, index):
        z = z[torch.as_tensor(chosen, device=z.device)]
        total = torch.zeros(int(index.max()) + 1, z.shape[1], device=z.device)
        total.index_add_(0, torch.as_tensor(index, device=z.device), z)
        return F.normalize(total)

    ways = {}
    for name, embedder in owned.without_pairs().items():
        originals = group.gallery_embeddings(embedder)
        ways[name] = Search(
            means(group.probe_embeddings(embedder), asked, probe),
            means(originals, in_gallery, item), np.searchsorted(everybody, people), everybody,
            group.device, ceiling_probes=means(originals, group.source[asked], probe))
    return ways


def repeated(group, owned, cfg):
    """The mean embedding of eight releases of each image under different masks."""
    if not group.is_random():
        return None
    embedders = owned.without_pairs()
    totals = {name: group.probe_embeddings(e).clone() for name, e in embedders.items()}
    for seed in range(10**6 + 1, 10**6 + 8):
        released = group.protected(group.sources(), seed)
        for name, embedder in embedders.items():
            totals[name] += embedder.embed_images(released).to(totals[name].device)
    return {name: group.search(F.normalize(totals[name]), group.gallery_embeddings(embedder))
            for name, embedder in embedders.items()}


# --------------------------------------------------------- attackers with pairs of others

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


def linear(group, owned, cfg):
    """A linear map from released to original embeddings, fitted to pairs of other people."""
    embedder, count = owned.embedder('judge'), len(group.pair_person)
    parts = [[embedder.embed_images(images) for images in group.training_pairs(chosen, 1)]
             for chosen in np.array_split(np.arange(count), count // 2048 + 1)]
    x, y = (torch.cat(z).double() for z in zip(*parts))
    centre, target = x.mean(0), y.mean(0)
    gallery = in_blocks(group.gallery_embeddings(embedder),
                        lambda z: F.normalize(z.double() - target), x.device)
    ways = {}
    for name, fit in (('ridge', ridge), ('rotation', procrustes)):
        matrix = fit(x - centre, y - target)

        def mapped(z, matrix=matrix):
            return F.normalize((z.double() - centre) @ matrix)

        probes = in_blocks(group.probe_embeddings(embedder), mapped, x.device)
        ways[name] = group.search(probes, gallery)
    return ways


def trained(group, owned, cfg):
    """A copy of the judge, trained to see a protected image and its original alike: others' pairs,
    fresh masks, InfoNCE (arXiv 1807.03748, eq. 4) both ways; unscaled: no fp16."""
    torch.manual_seed(0)
    steps, device = cfg.evaluate.attack_steps, group.device
    net = copy.deepcopy(owned.embedder('judge').net).train()
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
        with process.autocast(device, cfg.run.precision.replace('fp16', 'fp32')):
            z = net(embed.for_recogniser(images, net))
        z, w = F.normalize(z.float()).chunk(2)
        loss = F.cross_entropy(16 * z @ w.T, right) + F.cross_entropy(16 * w @ z.T, right)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    process.agree_on(net)
    return nearest(Embedder('trained', net.eval(), cfg, device), group)


# ------------------------------------------------------------------- membership inference

@dataclass
class Membership:
    """How sure a recogniser is of photos that it was trained on, and of others."""
    members: np.ndarray       # float32 (n,)
    others: np.ndarray        # float32 (m,)


def membership(group, owned, cfg):
    """Whether the insider is surer of the photos behind its training images than of others: the
    largest cosine with a class centre."""
    if not owned.insider or group.outsiders is None:
        return None
    centres = F.normalize(load_checkpoint(owned.student)['head']['weight']).to(group.device)
    at_a_time = max(1, (1 << 28) // len(centres))         # images, whose cosines take 1 GiB

    def surest(chosen):
        z = owned.insider.embed(chosen)
        return torch.cat([(part.to(centres.device) @ centres.T).amax(1).cpu()
                          for part in z.split(at_a_time)]).numpy()

    return Membership(surest(group.sources()), surest(group.outsiders))


def membership_figures(groups):
    """How well the score tells members from others, over the Membership of all groups."""
    members = np.concatenate([m.members for m in groups])
    others = np.concatenate([m.others for m in groups])
    distance = -np.concatenate([members, others])
    same = np.arange(len(distance)) < len(members)
    return {'auc': auc(distance, same),
            'tpr@fpr=1e-2': tar_at_far(distance, same, 1e-2),
            'members': len(members), 'others': len(others)}


# -------------------------------------------------------------------------- the attackers

@dataclass
class Attacker:
    """A line of ATTACKERS."""
    function: Callable        # of the signature at the head of this file
    has: str                  # what the attacker has, printed beside every number
    # Which questions it answers: results.json has its figures as <name>_<question>
    questions: tuple = ('same_person', 'same_image')


ATTACKERS = {
    'judge': Attacker(
        nearest_to('judge'), has='a recogniser that this kit trained on other people'),
    'teacher': Attacker(nearest_to('teacher'), has='the very recogniser that shaped the release'),
    'dlib': Attacker(
        nearest_to('dlib'), has="a published recogniser, dlib's, which anybody can install"),
    'pixels': Attacker(
        pixels, has='nothing: compares 16 x 16 pixels, or patches that look visible'),
    'masked': Attacker(masked, has='the masks: compares visible pixels only'),
    'guess': Attacker(guess, has='a guess of the masks: compares visible pixels only'),
    'insider': Attacker(
        nearest_to('insider'), has='the release: trains a recogniser on it'),
    'linear': Attacker(
        linear, has='released images of other people and their originals: a linear map'),
    'trained': Attacker(
        trained, has='the same pairs: trains a recogniser to see both alike'),
    'class': Attacker(
        by_label, has="the labels: averages half of a person's images, and the other photos",
        questions=('label',)),
    'repeated': Attacker(
        repeated, has='eight releases of the same photos with other masks'),
    'membership': Attacker(
        membership, has='the insider: looks how sure it is of a photo', questions=('recogniser',)),
}
# Who count as the strongest attacker, whatever others a config adds: they need one release and no
# secret of it, and every config can run them
STRONGEST = 'judge', 'pixels', 'linear', 'insider'


@dataclass
class AttackResult:
    """What came out of one attack, over all groups."""
    figures: dict                           # {question: figures of results.json}
    way: str = ''                           # that finds most photos
    cosines: np.ndarray | None = None       # float32 (n,) of probes and their originals, that way


def attack(entry, groups, owners, cfg):
    """The AttackResult of an entry of evaluate.attacks on AttackGroups, whose attackers have
    `owners` (Owned, one a group), or None where it makes no sense."""
    attacker = ATTACKERS.get(entry, Attacker(nearest_to(entry), has='a recogniser, by its path'))
    attempts = [attacker.function(group, owned, cfg) for group, owned in zip(groups, owners)
                if len(group.source)]
    attempts = [attempt for attempt in attempts if attempt]
    if not attempts:
        return None
    if isinstance(attempts[0], Membership):
        [question] = attacker.questions
        return AttackResult({question: membership_figures(attempts)})
    best = retrieval.best_ways(attempts, attacker.questions)
    result = AttackResult({question: way.figures() for question, way in best.items()})
    if photo := best.get('same_image'):
        result.way, result.cosines = photo.name, photo.cosines()
    return result


def check_attacks(cfg):
    """Refuse names in evaluate.attacks that are no attack and no file."""
    if 'trained' in cfg.evaluate.attacks:
        refuse_published(cfg.judge.checkpoint, 'the attack named trained trains the judge further')
    for name in cfg.evaluate.attacks:
        if name not in ATTACKERS and not Path(name).is_file():
            raise InputError(f'evaluate.attacks has {name!r}: choose from {", ".join(ATTACKERS)}, '
                             'or name an insightface backbone or an .onnx file')


def short_names(wanted):
    """{entry of evaluate.attacks: its name in tables}: of a path its stem, if no other has it."""
    stems = {entry: Path(entry).stem if Path(entry).is_file() else entry for entry in wanted}
    others = [*stems.values(), *(name for name in ATTACKERS if name not in stems)]
    return {entry: stem if others.count(stem) == 1 else entry for entry, stem in stems.items()}


# --------------------------------------------------------------- what its figures depend on

# Keys of the config that an attack reads, beside what digest_of_row() has of images and nets
KEYS = ('reconstruct', 'mae.patch', 'run.row', 'run.seed', 'run.precision', 'data.size',
        'judge.checkpoint', 'teacher.checkpoint', 'evaluate.attack_steps', 'evaluate.probes',
        'evaluate.gallery', 'evaluate.onnx_pixels')


def digest_of_attack(row, entry):
    """What an entry of evaluate.attacks depends on, 64 hex digits: digest_of_row() and the
    recogniser that it may name."""
    return files.digest(repr([row, digest_of(entry), versions([entry])]).encode())


def digest_of_row(planned, folds, release):
    """What all attacks on a row depend on, 64 hex digits: equal ones mean equal results. planned:
    its PlannedRelease; release: the FaceSet of it."""
    variant, private = planned.variant, planned.private
    cfg = variant.cfg
    images = [private.digest(not_excluded(private, cfg)), release.digest(slice(None))]
    nets = [cfg.judge.checkpoint, cfg.teacher.checkpoint, variant.student]
    for fold in folds:
        images += [fold.public.digest(fold.train), fold.public.digest(fold.mae)]
        nets += [variant.run / f'fold{fold.k}' / f'{role}.pt' for role in ('judge', 'teacher')]
    machine = provenance(planned.device)
    return files.digest(repr([
        settings(cfg, KEYS), code_digest(), planned.made_from, images,
        [digest_of(path) for path in nets], versions([cfg.judge.checkpoint]),
        [machine[what] for what in ('device', 'torch', 'numpy')]]).encode())


def code_digest():
    """Hex digits of the code that figures depend on: all but what only shows."""
    kit = Path(__file__).parents[1]
    paths = [path for path in sorted(kit.glob('*/*.py')) if path.parent.name != 'report']
    return files.digest(b''.join(path.read_bytes() for path in [Path(models.__file__), *paths]))

"""Attackers who look at visible patches alone, because they know or guess the masks."""
import numpy as np
import torch
import torch.nn.functional as F
from einops import repeat
from torch import nn

from facekit import run
from facekit.batches import Store
from facekit.images import to_float
from facekit.retrieval import Attack, Search


def cells(chosen, side, device):
    """Mean colour of side x side cells of ImageRows in 0..1, (n, 3, side, side), and a guess of
    how visible they are (n, 1, side, side): their variance v, as v / (v + its image's mean)."""
    colour, visible = [], []
    for part in Store(chosen, device, once=True).ahead(torch.arange(len(chosen)).split(1024)):
        x = to_float(part)
        mean, square = (F.adaptive_avg_pool2d(t, side) for t in (x, x.square()))
        v = (square - mean.square()).mean(1, keepdim=True).clamp(min=0)
        colour.append(mean)
        visible.append(v / (v + v.mean((2, 3), keepdim=True) + 1e-8))
    return torch.cat(colour), torch.cat(visible)


def visible_cells(group, side, device):
    """1 where a cell of a probe lies in a visible patch, float32 (n, 1, side, side)."""
    if group.hidden is None:
        return torch.ones(len(group.source), 1, side, side, device=device)
    return repeat(1 - group.hidden.to(device), 'n (h w) -> n 1 (h p) (w q)', h=side // 2, p=2, q=2)


class Patches:
    """Probes and gallery of an AttackGroup as side x side cells of colour, two by two a patch,
    which are compared where a weight says that they are visible."""

    def __init__(self, group, device):
        self.group, side = group, 32
        if group.hidden is not None:
            side = 2 * round(group.hidden.shape[1] ** 0.5)
        self.side, originals = side, cells(group.originals, side, device)[0]
        self.own = originals[group.source]                               # (n, 3, side, side)
        self.released, self.detail = cells(group.released, side, device)
        # -sum w (a - b)^2 up to what does not depend on b, as an inner product
        self.gallery = torch.cat([originals, originals.square()], 1).flatten(1)

    def search(self, colour, weight):
        """The Search of `colour` (n, 3, side, side), where weight (n, 1, side, side) is not 0."""
        probes, ceiling = (torch.cat([2 * weight * x, -weight.expand_as(x)], 1).flatten(1)
                           for x in (colour, self.own))
        return Search(probes, self.gallery, self.group.source, self.group.person,
                      ceiling_probes=ceiling, embeddings=False)

    def by_look(self):
        """Searches of whoever sees in a released image which of its patches are visible: those
        with detail, those that are not grey."""
        coloured = (self.released - 0.5).abs().amax(1, keepdim=True) > 0.02
        return {'patches with detail': self.search(self.released, self.detail),
                'patches not grey': self.search(self.released, coloured.float())}


def patchwork(group, cfg, device, original=False):
    """Nearest original in the visible patches: the attacker who knows the mask and, as a curve,
    those who guess it: by look, or by a net that learnt it from other people's protected images,
    whose masks he knows. `original` has the visible patches of the original image instead of what
    was released."""
    if original and group.hidden is None:
        return None
    patches = Patches(group, device)
    known = visible_cells(group, patches.side, device)
    if original:
        return Attack({'visible patches': patches.search(patches.own, known)})
    learnt = known if group.hidden is None else patches.detail
    if group.protection and group.hidden is not None:
        learnt = F.interpolate(guess_masks(group, cfg, device), (patches.side,) * 2,
                               mode='nearest')
    guesses = patches.by_look() | {'learnt': patches.search(patches.released, learnt)}
    return Attack({'known masks': patches.search(patches.released, known)}, {'mask': guesses})


def guess_masks(group, cfg, device):
    """How likely each patch of the probes is visible, float32 (n, 1, g, g) of g x g patches.

    A small net that was trained on other people's images, protected by the attacker himself.
    """
    torch.manual_seed(0)
    patch = cfg.mae.patch
    net = nn.Sequential(
        nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 64, patch, patch), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 1, 1)).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    rng, size = np.random.default_rng(0), min(64, len(group.pair_person))
    for step in range(cfg.evaluate.attack_steps):
        chosen = rng.choice(len(group.pair_person), size, replace=False)
        protected = torch.as_tensor(group.training_pairs(chosen, 2 + step)[0])
        logits = net(with_detail(protected.to(device)))
        visible = 1 - group.pair_hidden(chosen, 2 + step).to(device)
        loss = F.binary_cross_entropy_with_logits(logits.flatten(1), visible)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    run.agree_on(net)
    with torch.no_grad():
        some = torch.arange(len(group.released)).split(512)
        return torch.cat([net(with_detail(part)).sigmoid()
                          for part in Store(group.released, device, once=True).ahead(some)])


def with_detail(images):
    """uint8 (B, H, W, 3) -> float32 (B, 6, H, W): the images, and what a blur takes from them."""
    x = to_float(images)
    return torch.cat([x - 0.5, 10 * (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))], 1)

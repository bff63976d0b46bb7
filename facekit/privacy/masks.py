"""Attackers who look at visible patches alone, because they know or guess the masks."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from facekit.base import process
from facekit.data.batches import Store
from facekit.data.images import to_float
from facekit.privacy import protect


def cells(chosen, side, device):
    """Mean colour of side x side cells of ImageRows in 0..1, (n, 3, side, side), and a guess of
    how visible they are (n, 1, side, side): their variance v, as v / (v + its image's mean)."""
    colour, visible = [], []
    for part in Store(chosen, device).ahead(torch.arange(len(chosen)).split(1024)):
        x = to_float(part)
        mean, square = (F.adaptive_avg_pool2d(t, side) for t in (x, x.square()))
        v = (square - mean.square()).mean(1, keepdim=True).clamp(min=0)
        colour.append(mean)
        visible.append(v / (v + v.mean((2, 3), keepdim=True) + 1e-8))
    return torch.cat(colour), torch.cat(visible)


class Patches:
    """Probes and gallery of an AttackGroup as side x side cells of colour, two by two a patch,
    which are compared where a weight says that they are visible."""

    def __init__(self, group):
        self.group, self.side = group, 32
        if group.hidden is not None:
            self.side = 2 * math.isqrt(group.hidden.shape[1])
        originals, _ = cells(group.originals, self.side, group.device)
        self.own = originals[group.source]                               # (n, 3, side, side)
        self.released, self.detail = cells(group.released, self.side, group.device)
        # -sum w (a - b)^2 up to what does not depend on b, as an inner product
        self.gallery = torch.cat([originals, originals.square()], 1).flatten(1)

    def search(self, weight):
        """The Search of the probes where weight (n, 1, side, side) is not 0."""
        probes, ceiling = (torch.cat([2 * weight * x, -weight.expand_as(x)], 1).flatten(1)
                           for x in (self.released, self.own))
        return self.group.search(probes, self.gallery, ceiling_probes=ceiling, is_cosine=False)

    def known(self):
        """1 where a cell lies in a visible patch, float32 (n, 1, side, side)."""
        if self.group.hidden is None:
            return torch.ones_like(self.detail)
        return protect.drawn(1 - self.group.hidden.to(self.group.device), 2)

    def by_look(self):
        """Searches of whoever sees in a released image which of its patches are visible: those
        with detail, those that are not grey."""
        coloured = (self.released - 0.5).abs().amax(1, keepdim=True) > 0.02
        return {'patches with detail': self.search(self.detail),
                'patches not grey': self.search(coloured.float())}


def masked(group, owned, cfg):
    """The nearest original in the visible patches, by somebody who knows the masks."""
    patches = Patches(group)
    return {'known masks': patches.search(patches.known())}


def guess(group, owned, cfg):
    """The same, by somebody who guesses the masks: by look, or by a net that learnt from other
    people's protected images, whose masks he knows."""
    patches = Patches(group)
    if group.hidden is None:             # the method hides nothing, or nobody knows what it does
        return patches.by_look() | {'all patches': patches.search(patches.known())}
    learnt = F.interpolate(guess_masks(group, cfg), patches.side, mode='nearest')
    return patches.by_look() | {'learnt': patches.search(learnt)}


def guess_masks(group, cfg):
    """How likely each patch of the probes is visible, float32 (n, 1, g, g) of g x g patches, by a
    small net that learns from other people's images, which the attacker protects himself."""
    torch.manual_seed(0)
    patch, device = cfg.mae.patch, group.device
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
    process.agree_on(net)
    with torch.no_grad():
        some = torch.arange(len(group.released)).split(512)
        return torch.cat([net(with_detail(part)).sigmoid()
                          for part in Store(group.released, device).ahead(some)])


def with_detail(images):
    """uint8 (B, H, W, 3) -> float32 (B, 6, H, W): the images, and what a blur takes from them."""
    x = to_float(images)
    return torch.cat([x - 0.5, 10 * (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))], 1)

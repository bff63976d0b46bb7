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


def patchwork(group, cfg, device, original=False):
    """Nearest original in the visible patches, two by two cells each: the attacker who knows the
    mask and, as a curve, those who guess it: by detail, or by a net that learnt it from other
    people's protected images, whose masks he knows. `original` has the visible patches of the
    original image instead of what was released."""
    if original and group.hidden is None:
        return None
    side = 32 if group.hidden is None else 2 * round(group.hidden.shape[1] ** 0.5)
    originals = cells(group.originals, side, device)[0]
    own = originals[group.source]
    # -sum w (a - b)^2 up to what does not depend on b, as an inner product
    gallery = torch.cat([originals, originals.square()], 1).flatten(1)

    def search(colour, weight):
        probes, ceiling = (torch.cat([2 * weight * x, -weight.expand_as(x)], 1).flatten(1)
                           for x in (colour, own))
        return Search(probes, gallery, group.source, group.person, ceiling_probes=ceiling)

    known = visible_cells(group, side, device)
    if original:
        return Attack(search(own, known))
    released, detail = cells(group.released, side, device)
    guesses = {'by detail': search(released, detail)}
    learnt = known if group.hidden is None else detail
    if group.protection and group.hidden is not None:
        learnt = guess_masks(group, cfg, device)
        learnt = F.interpolate(learnt, (side, side), mode='nearest')
    guesses['estimated'] = search(released, learnt)
    return Attack(search(released, known), {'mask': guesses})


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

"""results/toy/idea.png: drawn faces, what FaceMAE makes of them, and the relations among both.

    make demo && .venv/bin/python results/toy/idea.py
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from facekit.base import config
from facekit.data.images import to_float
from facekit.data.people import split
from facekit.nets import embed
from facekit.nets.weights import recogniser
from facekit.privacy import protect
from facekit.privacy.release import planned_release

PEOPLE, EACH = 4, 2           # how many are shown, and how many photos of each
CPU = torch.device('cpu')


def shown(cfg):
    """Faces of the first PEOPLE of the release, EACH of one after the other; what their masks
    leave visible; what is released of them: each float (N, 3, H, W) in 0..1."""
    variant = config.variants(cfg, compare=False)[0]
    planned = planned_release(variant, split(cfg), CPU)
    plan, [protection] = planned.plan, planned.protections
    rows = np.concatenate([np.flatnonzero(plan.label == person)[:EACH]
                           for person in range(PEOPLE)])
    originals, seeds = planned.private.select(plan.image[rows]).tensor(), plan.seeds[rows]
    hidden = protect.hidden_patches(seeds, variant.cfg.reconstruct.mask_ratio, cfg)
    return (to_float(originals), protect.greyed(to_float(originals), hidden),
            to_float(protection(originals, seeds)))


def relations(faces, teacher):
    """Cosines, numpy (N, N), between the teacher's embeddings of float images in 0..1."""
    with torch.inference_mode():
        z = F.normalize(teacher(embed.for_recogniser(faces, teacher)).float())
    return (z @ z.T).numpy()


def mosaic(rows, gap=3):
    """Rows of faces, float (N, 3, H, W), as one picture, (rows * (H + gap), N * (W + gap), 3)."""
    lines = [torch.cat(list(F.pad(faces, [0, gap, 0, gap], value=1)), dim=2) for faces in rows]
    return torch.cat(lines, dim=1).permute(1, 2, 0).clamp(0, 1).numpy()


def draw(cfg, path):
    """Write the picture of a finished run, PNG."""
    teacher = recogniser(f'{cfg.run.folder}/fold0/teacher.pt', CPU, 'make demo')
    originals, visible, released = shown(cfg)
    names = [letter for letter in 'ABCD' for _ in range(EACH)]
    figure = Figure(figsize=(8, 2.05), dpi=200, layout='constrained')
    faces, *panels = figure.subplots(1, 3, width_ratios=[3.5, 1.25, 1.25])
    step = originals.shape[-1] + 3
    middles = [step * (i + 0.5) for i in range(len(names))]
    faces.imshow(mosaic([originals, visible, released]), interpolation='nearest')
    faces.xaxis.tick_top()
    faces.set_xticks(middles, names, fontsize=9)
    faces.set_yticks(middles[:3], ['photos', 'a quarter\nis visible', 'released'], fontsize=9)
    for panel, images, which in zip(panels, (originals, released), ('photos', 'released')):
        heat = panel.imshow(relations(images, teacher), vmin=-0.2, vmax=1, cmap='viridis')
        panel.set_title(f'relations\namong the {which}', fontsize=9)
        panel.set_xticks(range(len(names)), names, fontsize=8)
        panel.set_yticks(range(len(names)), names, fontsize=8)
    for axes in (faces, *panels):
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(heat, ax=panels, shrink=0.8, ticks=[0, 0.5, 1])
    bar.ax.tick_params(labelsize=8)
    figure.savefig(path)


if __name__ == '__main__':
    draw(config.namespace(config.resolve(ROOT / 'configs' / 'toy.yaml')),
         Path(__file__).with_suffix('.png'))

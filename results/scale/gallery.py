"""How many are found among 95 to 757 people, by attackers of a finished run, in each seed of
compare_seeds; see results/runs.md.

    python results/scale/gallery.py configs/lfw_half.yaml OUT.json [section.key=value ...]
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from facekit.base.config import namespace, resolve, variants
from facekit.data import faces
from facekit.data.people import share_of, split
from facekit.nets import embed
from facekit.nets.weights import load_finished, recogniser_from
from facekit.privacy import attacks
from facekit.privacy.groups import Owned, own_groups
from facekit.privacy.release import planned_release

ATTACKERS = 'judge', 'pixels', 'insider'
CPU = torch.device('cpu')


def some_people(group, people):
    """The AttackGroup with some people (P,) alone, as probes and gallery."""
    gallery = np.flatnonzero(np.isin(group.person, people))
    probes = np.flatnonzero(np.isin(group.source, gallery))
    hidden = None
    if group.hidden is not None:
        hidden = group.hidden[torch.from_numpy(probes)]
    return replace(group, released=group.released.take(probes), embedded={}, hidden=hidden,
                   originals=group.originals.take(gallery), person=group.person[gallery],
                   source=np.searchsorted(gallery, group.source[probes]))


def main(config, out, words):
    cfg, found = namespace(resolve(config, words)), {}
    for variant in variants(cfg, compare=True):
        folds = split(variant.cfg)
        planned = planned_release(variant, folds, CPU)
        release = faces.load_release(variant)
        maes = [protection.mae for protection in planned.protections]
        [group] = own_groups(variant.cfg, folds, maes, release, planned.plan, CPU)
        student = recogniser_from(load_finished(variant.student, ''), variant.student, CPU)
        names, order = folds[0].private.people, np.unique(group.person)
        order = np.array(sorted(order, key=lambda person: share_of(names[person], 'scale')))
        for count in (95, 190, 379, len(order)):
            part = some_people(group, order[:count])
            insider = embed.Embedder('insider', student, variant.cfg, CPU)
            owned = Owned(variant.cfg, 0, folds[0], CPU, {}, insider, variant.student)
            tried = [attacks.attack(name, [part], [owned], variant.cfg).figures
                     for name in ATTACKERS]
            for question in ('same_person', 'same_image'):
                best = max((figures[question] for figures in tried),
                           key=lambda figures: figures['rank1_of_choosers'])
                row = found.setdefault(variant.name, {}).setdefault(count, {})
                row.setdefault(question, []).append({
                    key: best[key] for key in ('rank1', 'rank1_ci', 'each_person_once', 'chance',
                                               'probes', 'people')} | {'seed': variant.seed})
            print(variant.name, variant.seed, count, flush=True)
            Path(out).write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

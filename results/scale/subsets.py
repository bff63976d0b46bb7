"""A release of fewer people, from a finished one: the same people in all rows, chosen by a hash of
their names; see results/runs.md.

    python results/scale/subsets.py configs/lfw_half.yaml ROW SEED PEOPLE OUT
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from facekit.base.config import namespace, resolve, variants
from facekit.data.people import share_of, split
from facekit.data.records import Records, write_records
from facekit.privacy.release import plan_release, release_secret


def main(config, row, seed, count, out):
    cfg = namespace(resolve(config))
    [variant] = [v for v in variants(cfg, compare=True)
                 if v.seed == int(seed) and v.name == row]
    folds = split(variant.cfg)
    private = folds[0].private
    plan = plan_release(folds, release_secret(variant.cfg), variant.cfg)
    person, released = private.labels[plan.image], Records(variant.release)
    order = sorted(np.unique(person), key=lambda p: share_of(private.people[p], 'scale'))
    chosen = np.flatnonzero(np.isin(person, order[:int(count)]))
    _, labels = np.unique(plan.label[chosen], return_inverse=True)
    write_records(out, [bytes(released[i]) for i in chosen], labels, cfg.data.size)


if __name__ == '__main__':
    main(*sys.argv[1:])

"""Differences between rows over the seeds of all three trainings of lfw_half.yaml, with 95 %
intervals over seeds (Student's t); see results/runs.md.

    python results/lfw_half/differences.py > results/lfw_half/differences.txt
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from facekit.measure.statistics import t_half_width
from facekit.report.tables import STRONGEST

HERE = Path(__file__).resolve().parent
PAIRS = (('facemae', 'noise_128'), ('facemae', 'mask'), ('facemae', 'blur_4'),
         ('facemae', 'mae_mse'), ('facemae', 'hidden_irm'), ('hidden_irm', 'hidden'),
         ('hidden_irm_pasted', 'hidden_irm'), ('hidden', 'mask'), ('originals', 'facemae'))
SETS = 'cfp_ff', 'cfp_fp', 'glint17'


def accuracies(results):
    """Mean of the six columns, per cent, by seed."""
    return {r['seed']: 100 * np.mean([figures['accuracy']
                                      for name, figures in r['verification'].items()
                                      if name.split()[0] in SETS]) for r in results}


def leakage(results, question, key):
    """What the strongest attacker finds, per cent, by seed."""
    found = {}
    for r in results:
        tried = [r['privacy'][f'{name}_{question}'] for name in STRONGEST]
        best = max(tried, key=lambda figures: figures['rank1_of_choosers'])
        found[r['seed']] = 100 * best[key]
    return found


def interval(values):
    """'mean [low, high; n = number]' of values."""
    half = t_half_width(values)
    mean = np.mean(values)
    return f'{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}; n = {len(values)}]'


def main():
    runs = [json.loads((HERE / f'{name}.json').read_text())['rows']
            for name in ('results', 'again', 'now')]
    for one, other in PAIRS:
        both = [[accuracies(run[row]) for row in (one, other)]
                for run in runs if one in run and other in run]
        gains = [a[seed] - b[seed] for a, b in both for seed in a if seed in b]
        print(f'accuracy, {one} minus {other}, points: {interval(gains)}')
    for question, key in (('same_person', 'rank1'), ('same_person', 'each_person_once'),
                          ('same_image', 'rank1')):
        for other in ('noise_128', 'mae_mse', 'mask'):
            a, b = (leakage(runs[2][row], question, key) for row in ('facemae', other))
            shares = [100 * a[seed] / b[seed] for seed in a]
            print(f'{question} {key}, facemae as a share of {other}, %: {interval(shares)}')


if __name__ == '__main__':
    main()

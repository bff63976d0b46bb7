"""Accuracy of students of 95 to 757 people, and how much of the gap between masked images and
originals each release closes; see results/runs.md.

    python results/scale/scale.py RUNS OUT     # RUNS/<row>_<people>_s<seed>/external_scores/*.csv
"""
import csv
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from facekit.measure.statistics import t_half_width
from facekit.measure.verification import fold_decisions

ROWS = {'originals': 'originals', 'noise_128': 'noise, 128', 'facemae': "kit's FaceMAE",
        'hidden_irm': "MAE's own loss and relations", 'mask': 'masked'}
DRAWS = 2000


def right(folder):
    """{set: whether each pair is decided rightly, float64 (P,), the mean of plain and centred}."""
    found = {}
    for path in sorted((folder / 'external_scores').glob('pairs_*.csv')):
        with open(path) as file:
            _, *lines = csv.reader(file)
        distance, same = np.array(lines, float).T
        name = path.stem.removeprefix('pairs_').removesuffix(' centred')
        found.setdefault(name, []).append(fold_decisions(distance, same > 0)[0].astype(float))
    return {name: np.mean(columns, 0) for name, columns in found.items()}


def means(decisions, rng):
    """Mean over sets, of DRAWS bootstrap draws of pairs, the same for all rows; the first is of
    all pairs: {row: float64 (DRAWS + 1,)}."""
    total = {row: np.zeros(DRAWS + 1) for row in decisions}
    sets = next(iter(decisions.values()))
    for name, first in sets.items():
        count = len(first)
        weights = np.vstack([np.ones(count), rng.multinomial(
            count, np.full(count, 1 / count), DRAWS)]) / count
        for row in decisions:
            total[row] += weights @ decisions[row][name] / len(sets)
    return total


def over_seeds(draws, rng):
    """Means over seeds, {row: float64 (DRAWS + 1,)}, of what means() gives for each; the draws
    also have the spread of few seeds (Student's t), which rows share where they vary together."""
    count = len(draws)
    total = {row: np.mean([d[row] for d in draws], 0) for row in draws[0]}
    if count > 1:
        weights = rng.standard_normal((DRAWS, count))
        weights *= np.sqrt((count - 1) / rng.chisquare(count - 1, (DRAWS, 1)))
        for row in total:
            apart = np.array([d[row][0] for d in draws]) - total[row][0]
            total[row][1:] += weights @ apart / np.sqrt(count * (count - 1))
    return total


def summary(runs):
    """{people: {row: figures}} of the seeds that are there, per cent."""
    result = {}
    for people in (95, 190, 379, 757):
        draws = []
        for seed in range(3):
            folders = {row: runs / f'{row}_{people}_s{seed}' for row in ROWS}
            if all((folder / 'external.json').exists() for folder in folders.values()):
                draws.append(means({row: right(folder) for row, folder in folders.items()},
                                   np.random.default_rng(0)))
        if not draws:
            continue
        result[people] = {}
        mean = over_seeds(draws, np.random.default_rng(1))
        for row in ROWS:
            ahead = mean[row] - mean['mask']
            figures = {'accuracy': mean[row], 'ahead of masked': ahead,
                       'share of the gap closed': ahead / (mean['originals'] - mean['mask']),
                       'ahead of noise': mean[row] - mean['noise_128']}
            of_seeds = [round(100 * d[row][0], 2) for d in draws]
            result[people][row] = {'seeds': len(draws), 'accuracy of each seed': of_seeds} | {
                name: [round(100 * x, 2) for x in (v[0], *np.percentile(v[1:], [2.5, 97.5]))]
                for name, v in figures.items()}
    return result


def lead(found, row, other):
    """By how many points a row is ahead of another, mean of all numbers of people, and by how many
    more with each doubling of them: each [mean of the seeds, low, high], a 95 % interval."""
    doublings = np.log2(list(found))
    ahead = np.array([[a - b for a, b in zip(*(figures[name]['accuracy of each seed']
                                               for name in (row, other)))]
                      for figures in found.values()]).T
    every = {'mean': ahead.mean(1), 'each doubling': np.polyfit(doublings, ahead.T, 1)[0]}
    return {name: [round(x, 2) for x in (v.mean(), v.mean() - t_half_width(v),
                                         v.mean() + t_half_width(v))]
            for name, v in every.items()}


def draw(found, path):
    """Two panels: accuracy, and the share of the gap, against the number of people."""
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    panels = figure.subplots(1, 2)
    for panel, what in zip(panels, ('accuracy', 'share of the gap closed')):
        for number, (row, name) in enumerate(ROWS.items()):
            if what != 'accuracy' and row in ('originals', 'mask'):
                continue
            people = list(found)
            middle, low, high = np.array([found[n][row][what] for n in people]).T
            shifted = np.array(people) * 1.02 ** (number - 2)
            panel.errorbar(shifted, middle, [middle - low, high - middle], marker='o', ms=4,
                           capsize=2, lw=1, label=name, color=f'C{number}')
        panel.set(xscale='log', xlabel='people in the release', ylabel=f'{what}, %')
        panel.set_xticks(people, [str(n) for n in people])
        panel.minorticks_off()
        panel.spines[['top', 'right']].set_visible(False)
    panels[1].set_ylim(-20, 100)                           # shares of small gaps are wide
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == '__main__':
    found = summary(Path(sys.argv[1]))
    leads = {f'{row} ahead of {other}': lead(found, row, other) for row, other in (
        ('facemae', 'noise_128'), ('facemae', 'mask'), ('facemae', 'hidden_irm'))}
    (Path(sys.argv[2]) / 'scale.json').write_text(json.dumps(found | leads, indent=1) + '\n')
    draw(found, Path(sys.argv[2]) / 'scale.png')

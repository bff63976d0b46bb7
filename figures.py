"""Pictures and tables of a run: faces, ROC, score histograms, privacy against utility."""
from pathlib import Path

import numpy as np
import torch
from rich.table import Column, Table
from torchvision.io import encode_png
from torchvision.utils import make_grid

import runtime

SURE = '#1b6ca8', '#d1495b', '#66a182', '#edae49', '#5d576b', '#8d96a3'
HAS = {        # what the attacker has, printed beside every number
    'judge': 'a recogniser of other people, off the shelf',
    'teacher': 'the very recogniser that shaped the release',
    'pixels': 'nothing: compares 16 x 16 pixels',
    'masked': 'the masks: compares visible pixels only',
    'visible': 'the unmasked patches of the original itself',
    'insider': 'the release: trains a recogniser on it',
    'linear': 'released images of other people and their originals: a linear map',
    'trained': 'the same pairs: trains a recogniser to see both alike',
    'class': 'the labels: averages all images of a person',
    'repeated': 'eight releases of the same photos with other masks',
    'membership_reconstruction': 'the model: AUC of telling the public faces it learnt from',
    'membership_recogniser': 'the recogniser of the release: AUC of telling who is in it',
}
MEANS = {
    'same_image': 'who holds the photo learns which released image was made of it',
    'same_person': 'who holds another photo of a person finds that person in the release',
}


def save_grid(image_rows, path):
    """Write a picture of several rows of images, each a float tensor (N, 3, H, W) in 0..1."""
    images = torch.cat([row.detach().float().cpu() for row in image_rows]).clamp(0, 1)
    grid = make_grid(images, nrow=len(image_rows[0]), padding=2, pad_value=1)
    if grid.shape[1] < 400:           # small faces would be a stamp on a screen
        grid = grid.repeat_interleave(2, 1).repeat_interleave(2, 2)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')          # torchvision's write_png ignores a full disk
    temporary.write_bytes(encode_png((grid * 255).round().byte()).numpy().tobytes())
    temporary.replace(path)


def plotting():
    """matplotlib.pyplot, or None and a line that says what is missing."""
    try:
        import matplotlib
    except ImportError:
        runtime.say('matplotlib is not installed (pip install -r requirements-dev.txt): '
                    'no ROC, histogram and privacy plots')
        return None
    matplotlib.use('Agg')
    from matplotlib import pyplot
    return pyplot


def save_plot(figure, path, x, y):
    for axes in figure.axes:
        axes.set(xlabel=x, ylabel=y)
        axes.spines[['top', 'right']].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
    temporary = path.with_suffix('.tmp')
    figure.savefig(temporary, format='png', dpi=120, bbox_inches='tight')
    temporary.replace(path)
    plotting().close(figure)


def histogram(curves, path):
    """Score histograms side by side; `curves` = {name: (cosines of true pairs, of others)}."""
    if not (plt := plotting()):
        return
    high, wide = -(-len(curves) // 6), min(len(curves), 6)
    figure, panels = plt.subplots(high, wide, figsize=(3.2 * wide, 3 * high), sharey=True,
                                  squeeze=False)
    for panel in panels.flat[len(curves):]:
        panel.remove()
    for panel, (name, both) in zip(panels.flat, curves.items()):
        for cosines, colour, label in zip(both, SURE, ('true pairs', 'others')):
            panel.hist(cosines, 40, (-1, 1), density=True, alpha=0.6, color=colour, label=label)
        panel.set_title(name)
    save_plot(figure, path, 'cosine', '')


def verification_plots(curves, folder):
    """ROC and score histograms; `curves` = {name: (distances (P,), same (P,) bool) numpy}."""
    if not (plt := plotting()):
        return
    figure, axes = plt.subplots(figsize=(5, 4))
    for (name, (distance, same)), colour in zip(curves.items(), SURE * 9):
        order = distance.argsort()
        tar = same[order].cumsum() / same.sum()
        far = (~same[order]).cumsum() / (~same).sum()
        axes.plot(far, tar, label=name, color=colour)
    axes.set_xscale('log')
    axes.set_xlim(1e-3, 1)
    save_plot(figure, folder / 'roc.png', 'false accept rate', 'true accept rate')
    histogram({name: (1 - d[same] / 2, 1 - d[~same] / 2) for name, (d, same) in curves.items()},
              folder / 'scores.png')


def privacy_pictures(found, cosines, released, originals, folder, name):
    """The scores of true and false pairs of a release, and its ten most linked pairs.

    cosines = {attack: (true (N,), false (N,))}; released and originals uint8 (N, H, W, 3). Linked
    by the strongest of these attacks: top released images, below their originals.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if cosines:
        histogram(cosines, folder / f'{name}_attacks.png')
        strongest = max(cosines, key=lambda a: found[f'{a}_same_image']['rank1'])
        best = cosines[strongest][0].argsort()[::-1][:10]
        save_grid([torch.as_tensor(x[best].copy()).permute(0, 3, 1, 2) / 255
                   for x in (released, originals)], folder / f'{name}_most_linked.png')


def leakage_of(result, kind='same_image'):
    """Rank-1 of the judge and of the strongest attack on this release, NaN without one.

    Attacks that hold more than the release do not count: several releases, the original's own
    patches, the secret masks; whoever guesses the masks counts."""
    rank1 = {a: f['rank1'] for a, f in result['privacy'].items()
             if a.endswith(kind) and not a.startswith(('visible', 'repeated', 'masked'))}
    rank1 |= {'guessed': f['curve']['mask']['estimated'] for a, f in result['privacy'].items()
              if a == f'masked_{kind}'}
    return {'judge': rank1.get(f'judge_{kind}', np.nan),
            'strongest attack': max(rank1.values(), default=np.nan)}


def tradeoff_plot(found, folder):
    """Leakage against utility; `found` = {row: [results of each seed]}.

    One point a row for the stock judge and one for the strongest attack; the same method at
    several mask ratios is joined by a line.
    """
    points, curves, chance = {}, {}, np.nan
    for row, results in found.items():
        if not any(r['privacy'] for r in results) or not results[0]['verification']:
            continue
        accuracy = np.mean([s['accuracy'] for r in results for s in r['verification'].values()])
        chance = next((f['chance'] for a, f in results[0]['privacy'].items()
                       if a.endswith('same_image')), np.nan)
        points[row] = {name: (100 * np.mean([leakage_of(r)[name] for r in results]),
                              100 * accuracy) for name in ('judge', 'strongest attack')}
        c = results[0]['config']
        if c['reconstruct']['method'] in ('facemae', 'mask'):
            weights = c['mae']['mse_weight'], c['irm']['weight'], c['reconstruct']['paste_visible']
            curves.setdefault((c['reconstruct']['method'], *weights), []).append(
                (c['reconstruct']['mask_ratio'], row))
    if not points or not (plt := plotting()):
        return
    figure, axes = plt.subplots(figsize=(6, 4.5))
    for name, marker, colour in (('judge', 'o', SURE[0]), ('strongest attack', 's', SURE[1])):
        axes.plot(*zip(*(p[name] for p in points.values())), marker, color=colour, label=name)
        for curve in curves.values():
            axes.plot(*zip(*(points[row][name] for _, row in sorted(curve))), '-', lw=0.8,
                      color=colour)
    axes.axvline(100 * chance, color='grey', ls=':', lw=1)
    figure.canvas.draw()              # settles where the points are
    taken = []                        # of names that would overlap, the upper one moves up
    for row, p in sorted(points.items(), key=lambda item: item[1]['strongest attack'][1]):
        x, y = axes.transData.transform(p['strongest attack'])
        at = max([y, *(other + 14 for beside, other in taken if abs(x - beside) < 80)])
        taken.append((x, at))
        axes.annotate(row, p['strongest attack'], textcoords='offset points',
                      xytext=(6, 4 + (at - y) * 72 / figure.dpi))
    save_plot(figure, folder / 'tradeoff.png',
              'originals found first from their released image, %',
              'verification accuracy, mean of sets, %')


def effort_plots(found, folder):
    """What more effort buys the attacker: leakage over the pairs that the linear attack learns
    from, and over repeated releases. `found` = {row: [results of each seed]}."""
    for attack, x in (('linear', 'pairs of other people'), ('repeated', 'releases of each photo')):
        curves = {(row, series): points for row, results in found.items() for series, points in
                  results[0]['privacy'].get(f'{attack}_same_image', {}).get('curve', {}).items()}
        if not curves or not (plt := plotting()):
            continue
        figure, axes = plt.subplots(figsize=(6, 4.5))
        for (row, series), points in curves.items():
            at = [int(n) for n in points]
            axes.plot(at, [100 * p for p in points.values()], marker='o', ms=3,
                      label=f'{row}, {series}', color=SURE[list(found).index(row) % 6],
                      ls='-' if series in ('ridge', 'recogniser') else ':')
        axes.set_xscale('log', base=2)
        save_plot(figure, folder / f'{attack}.png', x, 'original found first, %')


def differences(ahead, method):
    """By how much a method is ahead of other rows, in points, as tables of two sets each; `ahead`
    = {row: {set: figures of verification.paired_difference()}}."""
    tables = []
    for names in two_by_two(next(iter(ahead.values()), {})):
        tables.append(Table(
            f'{method} minus', *(Column(f'{n} {m}', justify='right') for n in names
                                 for m in ('acc.', 'TAR@FAR 1%')), title_justify='left',
            title='points [95 % interval over pairs and seeds]'))
        for row, sets in ahead.items():
            tables[-1].add_row(row, *('{:+.1f} [{:+.1f}, {:+.1f}]'.format(*(100 * np.array(x)))
                                      for n in names for x in sets[n].values()))
    return tables


def two_by_two(names):
    """The names of verification sets as tables have room for them."""
    names = list(names)
    return [names[i:i + 2] for i in range(0, len(names), 2)]


def tables(found):
    """Utility and leakage as two tables of per cents: `found` = {row: [results of each seed]}."""
    def cell(values, interval=None):
        values = 100 * np.array(values)
        if len(values) > 1:
            return f'{values.mean():.1f} ±{values.std(ddof=1):.1f}'
        return f'{values[0]:.1f}' + (' [{:.0f}, {:.0f}]'.format(*(100 * np.array(interval)))
                                     if interval else '')

    measures = {'acc.': 'accuracy', 'AUC': 'auc', 'TAR@FAR 1%': 'tar@far=1e-2'}
    utility = []
    for names in two_by_two(next(iter(found.values()))[0]['verification']):
        utility.append(Table(
            'released set',
            *(Column(f'{n} {m}', justify='right') for n in names for m in measures),
            title_justify='left', title='utility: verification of other people, %'))
        for row, results in found.items():
            utility[-1].add_row(row, *(cell([r['verification'][n][key] for r in results])
                                       for n in names for key in measures.values()))
    released = {row: results for row, results in found.items() if 'privacy' in results[0]}
    if not released:
        return utility
    who = Table('attacker', 'what it has', title='who tries', title_justify='left')
    for name, has in HAS.items():
        if any(a.startswith(name) for rs in released.values() for a in rs[0]['privacy']):
            who.add_row(name.replace('_', ' '), has)
    for kind, meaning in MEANS.items():
        who.add_row(kind.replace('_', ' '), meaning)
    return [*utility, *(leakage_table(dict(list(released.items())[i:i + 7]), cell)
                        for i in range(0, len(released), 7)), who]


def leakage_table(released, cell):
    """Rank-1 or AUC of every attack, a column for each of the rows `released`."""
    leakage = Table('attack', *(Column(row, justify='right') for row in released),
                    Column('chance', justify='right'), title_justify='left',
                    title='leakage: found at the first guess, % [95 % interval over people]')
    for attack in dict.fromkeys(a for rs in released.values() for a in rs[0]['privacy']):
        cells, chance = [], ''
        for results in released.values():
            figures = [r['privacy'][attack] for r in results if attack in r['privacy']]
            key = 'rank1' if 'rank1' in (figures or [{}])[0] else 'auc'
            cells.append(cell([f[key] for f in figures], figures[0].get('rank1_ci'))
                         if figures else '')
            chance = f'{100 * figures[0].get("chance", 0.5):.2f}' if figures else chance
        leakage.add_row(attack.replace('_', ' '), *cells, chance)
    leakage.add_row('PSNR, dB', *(f'{np.mean([r["reconstruction"]["psnr"] for r in results]):.1f}'
                                  for results in released.values()))
    return leakage

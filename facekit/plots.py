"""Pictures of a run: faces, ROC, score histograms, privacy against utility."""
import numpy as np
import torch
from torchvision.utils import make_grid

from facekit import files, run
from facekit.images import encode, to_float

COLOURS = '#1b6ca8', '#d1495b', '#66a182', '#edae49', '#5d576b', '#8d96a3'

def save_grid(image_rows, path):
    """Write a picture of several rows of images, each a float tensor (N, 3, H, W) in 0..1."""
    images = torch.cat([row.detach().float().cpu() for row in image_rows]).clamp(0, 1)
    grid = make_grid(images, nrow=len(image_rows[0]), padding=2, pad_value=1)
    if grid.shape[1] < 400:           # small faces would be a stamp on a screen
        grid = grid.repeat_interleave(2, 1).repeat_interleave(2, 2)
    with files.replacing(path) as file:
        file.write(encode((grid * 255).round().byte(), 'png'))


def plotting():
    """matplotlib.pyplot, or None and a line that says what is missing."""
    try:
        import matplotlib
    except ImportError:
        run.say('matplotlib is not installed (pip install -r requirements-dev.txt): '
                    'no ROC, histogram and privacy plots')
        return None
    matplotlib.use('Agg')
    from matplotlib import pyplot
    return pyplot


def save_plot(figure, path, x, y):
    """Write a figure whose axes are labelled x and y as PNG."""
    for axes in figure.axes:
        axes.set(xlabel=x, ylabel=y)
        axes.spines[['top', 'right']].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
    with files.replacing(path) as file:
        figure.savefig(file, format='png', dpi=120, bbox_inches='tight')
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
        for cosines, colour, label in zip(both, COLOURS, ('true pairs', 'others')):
            panel.hist(cosines, 40, (-1, 1), density=True, alpha=0.6, color=colour, label=label)
        panel.set_title(name)
    save_plot(figure, path, 'cosine', '')


def verification_plots(scores, folder, prefix=''):
    """ROC and score histograms of recognisers, {name: PairScores}, as <prefix>roc.png and
    <prefix>scores.png."""
    if not (plt := plotting()):
        return
    figure, axes = plt.subplots(figsize=(5, 4))
    for (name, s), colour in zip(scores.items(), COLOURS * 9):
        order = s.distance.argsort()
        tar = s.same[order].cumsum() / s.same.sum()
        far = (~s.same[order]).cumsum() / (~s.same).sum()
        axes.plot(far, tar, label=name, color=colour)
    axes.set_xscale('log')
    axes.set_xlim(1e-3, 1)
    save_plot(figure, folder / f'{prefix}roc.png', 'false accept rate', 'true accept rate')
    cosines = {name: 1 - s.distance / 2 for name, s in scores.items()}
    histogram({name: (c[scores[name].same], c[~scores[name].same]) for name, c in cosines.items()},
              folder / f'{prefix}scores.png')


def privacy_pictures(figures, cosines, released, originals, folder, name):
    """The scores of true and false pairs of a release, and its ten most linked pairs.

    cosines = {attack: (true (N,), false (N,))}; released and originals uint8 (N, H, W, 3). Linked
    by the strongest of these attacks: top released images, below their originals.
    """
    if cosines:
        histogram(cosines, folder / f'{name}_attacks.png')
        strongest = max(cosines, key=lambda a: figures[f'{a}_same_image']['rank1'])
        best = cosines[strongest][0].argsort()[::-1][:10]
        save_grid([to_float(torch.as_tensor(x[best].copy())) for x in (released, originals)],
                  folder / f'{name}_most_linked.png')


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
    for name, marker, colour in (('judge', 'o', COLOURS[0]), ('strongest attack', 's', COLOURS[1])):
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
                      label=f'{row}, {series}', color=COLOURS[list(found).index(row) % 6],
                      ls='-' if series in ('ridge', 'recogniser') else ':')
        axes.set_xscale('log', base=2)
        save_plot(figure, folder / f'{attack}.png', x, 'original found first, %')

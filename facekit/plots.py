"""Pictures of a run: faces, ROC, score histograms, privacy against utility."""
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from facekit import files, run
from facekit.images import to_uint8
from facekit.report import strongest_attack

TRUE, OTHERS = '#1b6ca8', '#d1495b'            # of score histograms
MARGIN, GAP, TEXT = 96, 3, 13                  # of face grids: left margin, gap, font size, pixels


# ------------------------------------------------------------------------------- faces

def save_grid(rows, path, title=''):
    """Write a picture of rows of faces, {label: float images (N, 3, H, W) in 0..1}, as PNG.

    Small faces are shown at twice their size.
    """
    faces = [to_uint8(images.detach().float().cpu()).numpy() for images in rows.values()]
    count, side = len(faces[0]), faces[0].shape[1]
    scale = 2 if count * side < 400 else 1
    step, top = scale * side + GAP, TEXT + 2 * GAP if title else 0
    picture = Image.new('RGB', (MARGIN + count * step, top + len(faces) * step), 'white')
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT)
    draw.text((GAP, GAP), title, 'black', font)
    for r, (label, images) in enumerate(zip(rows, faces)):
        draw.text((GAP, top + r * step + step // 2), label, 'black', font, anchor='lm')
        for i, image in enumerate(images):
            face = Image.fromarray(image).resize((scale * side,) * 2, Image.NEAREST)
            picture.paste(face, (MARGIN + i * step, top + r * step))
    with files.replacing(path) as file:
        picture.save(file, 'PNG', optimize=True)


def save_most_linked(attack, rank1, cosines, released, originals, path):
    """The ten probes whose original an attack scores highest, original above.

    cosines (n,) of probes with their originals; released, originals uint8 (n, H, W, 3).
    """
    best = cosines.argsort()[::-1][:10]
    rows = {label: torch.as_tensor(x[best].copy()).permute(0, 3, 1, 2) / 255
            for label, x in (('original', originals), ('released', released))}
    save_grid(rows, path, f'surest links of the attacker "{attack}" (finds {100 * rank1:.0f} %): '
              f'cosine {cosines[best[0]]:.2f} to {cosines[best[-1]]:.2f}')


# ------------------------------------------------------------------------------- plots

def plotting():
    """matplotlib.pyplot, or None and a line that says what is missing."""
    try:
        import matplotlib
    except ImportError:
        run.say('matplotlib is not installed (pip install matplotlib): '
                'no ROC, histogram and privacy plots')
        return None
    matplotlib.use('Agg')
    from matplotlib import pyplot
    return pyplot


def colours_of(names):
    """{name: colour}, no two alike."""
    from matplotlib import colormaps
    palettes = {name: list(colormaps[name].colors) for name in ('tab10', 'tab20', 'tab20b')}
    palette = palettes['tab10']
    if len(names) > 10:
        palette = palettes['tab20'] + palettes['tab20b'] + list(
            colormaps['turbo'](np.linspace(0, 1, max(0, len(names) - 40))))
    return dict(zip(names, palette))


def save_plot(figure, path):
    """Write a figure as PNG, without the upper and right lines of its axes."""
    for axes in figure.axes:
        axes.spines[['top', 'right']].set_visible(False)
    with files.replacing(path) as file:
        figure.savefig(file, format='png', dpi=120, bbox_inches='tight')
    plotting().close(figure)


def legend_beside(axes):
    """The legend to the right of the axes, where it covers no curve."""
    axes.legend(frameon=False, loc='center left', bbox_to_anchor=(1.01, 0.5), fontsize=8)


def histogram(cosines, path):
    """Score histograms side by side; cosines = {name: (of true pairs (n,), of others (m,))}."""
    if not (plt := plotting()):
        return
    high, wide = -(-len(cosines) // 6), min(len(cosines), 6)
    figure, panels = plt.subplots(high, wide, figsize=(3.2 * wide, 3 * high), sharey=True,
                                  squeeze=False)
    for panel in panels.flat[len(cosines):]:
        panel.remove()
    for panel, (name, both) in zip(panels.flat, cosines.items()):
        for values, colour, label in zip(both, (TRUE, OTHERS), ('true pairs', 'others')):
            panel.hist(values, 40, (-1, 1), density=True, alpha=0.6, color=colour, label=label)
        panel.set(title=name, xlabel='cosine')
    panels[0, 0].set_ylabel('density')
    legend_beside(panels.flat[min(wide, len(cosines)) - 1])
    save_plot(figure, path)


def verification_plots(scores, prefix):
    """ROC and score histograms of recognisers, {name: PairScores}, as <prefix>roc.png and
    <prefix>scores.png; the prefix begins with a folder."""
    if not (plt := plotting()):
        return
    figure, axes = plt.subplots(figsize=(5, 4))
    for name, colour in colours_of(scores).items():
        s = scores[name]
        order = s.distance.argsort()
        tar = s.same[order].cumsum() / s.same.sum()
        far = (~s.same[order]).cumsum() / (~s.same).sum()
        axes.plot(far, tar, label=name, color=colour)
    axes.set(xscale='log', xlim=(1e-3, 1), xlabel='false accept rate', ylabel='true accept rate')
    legend_beside(axes)
    save_plot(figure, f'{prefix}roc.png')
    cosines = {name: 1 - s.distance / 2 for name, s in scores.items()}
    histogram({name: (c[scores[name].same], c[~scores[name].same]) for name, c in cosines.items()},
              f'{prefix}scores.png')


def tradeoff_plot(measured, folder):
    """Leakage against utility, a panel a question; measured = {row: [results of each seed]}.

    Each row has a colour: its square is the strongest attack, its dot the judge alone.
    """
    rows = {row: results for row, results in measured.items()
            if results[0]['privacy'] and results[0]['verification']}
    if not rows or not (plt := plotting()):
        return
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for panel, (kind, asked) in zip(panels, (('same_person', 'another photo of the person'),
                                             ('same_image', 'the very original'))):
        for row, colour in colours_of(rows).items():
            accuracy = 100 * np.mean([s['accuracy'] for r in rows[row]
                                      for s in r['verification'].values()])
            strongest, judge = (100 * np.mean([figure_of(r['privacy']) for r in rows[row]])
                                for figure_of in (
                lambda privacy: strongest_attack(privacy, kind),
                lambda privacy: privacy.get(f'judge_{kind}', {}).get('rank1', np.nan)))
            panel.plot([judge, strongest], [accuracy] * 2, '-', color=colour, lw=1)
            panel.plot(judge, accuracy, 'o', color=colour, ms=5)
            panel.plot(strongest, accuracy, 's', color=colour, ms=6, label=row)
        chances = [figures['chance'] for r in next(iter(rows.values()))
                   for name, figures in r['privacy'].items() if name.endswith(kind)]
        if chances:
            panel.axvline(100 * chances[0], color='grey', ls=':', lw=1, label='chance')
        panel.set(xlabel=f'{asked} is found first, %')
    panels[0].set_ylabel('verification accuracy, mean of sets, %')
    panels[0].set_title('square: strongest attack, dot: judge', loc='left', fontsize=8)
    legend_beside(panels[1])
    save_plot(figure, folder / 'tradeoff.png')

"""Pictures of a run: faces, surest links, ROC, losses, privacy against utility."""
import errno
import os

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from facekit.base import files, process
from facekit.base.errors import optional
from facekit.base.log import read_log
from facekit.data.images import to_uint8
from facekit.report.tables import QUESTIONS, comparable

MARGIN, GAP, TEXT = 96, 3, 13                  # of face grids: left margin, gap, font size, pixels
LEGEND = dict(frameon=False, loc='center left', bbox_to_anchor=(1.01, 0.5), fontsize=8)


def save_grid(rows, path, title=''):
    """Write a picture of rows of faces, {label: float images (N, 3, H, W) in 0..1}, as PNG."""
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
    files.make_private(path.parent)
    with files.replacing(path) as file:
        picture.save(file, 'PNG', optimize=True)


def save_most_linked(attack, rank1, cosines, released, originals, path):
    """Write a picture of the ten released images whose originals an attacker is surest of, by
    cosines (n,) of `released` with `originals` (ImageRows); rank1: of how many it finds them."""
    best = cosines.argsort()[::-1][:10]
    save_pairs(released.take(best), originals.take(best),
               f'the {len(best)} surest links of "{attack}", which finds '
               f'{100 * rank1:.0f} % of all: cosine {cosines[best[0]]:.2f} to '
               f'{cosines[best[-1]]:.2f}', path)


def save_pairs(released, originals, title, path):
    """Write a picture of originals above released images, ImageRows alike."""
    save_grid({label: torch.as_tensor(images.pixels()).permute(0, 3, 1, 2) / 255
               for label, images in (('original', originals), ('released', released))},
              path, title)


def attempt(draw, *arguments):
    """draw(*arguments), of which the last is a picture's path, on rank 0, or say why not."""
    if process.rank():
        return
    try:
        draw(*arguments)
    except Exception as error:             # of matplotlib, a font, a folder, ...
        if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise                          # no results would find room either
        process.say(f'warning: a picture is missing, all figures are there ({arguments[-1]}: '
                    f'{error})')


def new_figure(**how):
    """A figure of matplotlib, for files alone: no backend or display is asked for."""
    os.environ['MPLBACKEND'] = 'Agg'       # another, of a notebook, can end its import
    return optional('matplotlib.figure', 'matplotlib').Figure(**how)


def colours_of(names):
    """{name: colour}, no two alike."""
    from matplotlib import colormaps
    return dict(zip(names, colormaps['turbo'](np.linspace(0.05, 0.95, len(names)))))


def save_plot(figure, path):
    """Write a figure as PNG."""
    for axes in figure.axes:
        axes.spines[['top', 'right']].set_visible(False)
    with files.replacing(path) as file:
        figure.savefig(file, format='png', dpi=120, bbox_inches='tight')


def save_roc(rows, path):
    """ROC of the first seed of Rows, on the first set that was tested."""
    tested = {row.name: next(iter(row.scores.values())) for row in rows if row.scores}
    if not any(tested.values()):
        return
    figure = new_figure(figsize=(5, 4))
    axes = figure.subplots()
    for name, colour in colours_of(tested).items():
        scores = next(iter(tested[name].values()))
        same = scores.same[scores.distance.argsort()]
        axes.plot((~same).cumsum() / (~same).sum(), same.cumsum() / same.sum(), label=name,
                  color=colour)
    axes.set(xscale='log', xlim=(1e-3, 1), xlabel='false accept rate', ylabel='true accept rate')
    axes.legend(**LEGEND)
    save_plot(figure, path)


def save_losses(logs, path):
    """Losses of all trainings whose logs lie in a folder, a panel a loss, a colour a training."""
    trainings = {str(log.relative_to(logs).with_suffix('')): [entry for _, entry in read_log(log)]
                 for log in sorted(logs.rglob('*.jsonl'))}
    figure = new_figure(figsize=(10, 4), layout='constrained')
    titles = {'loss': 'loss: of recognisers', 'mse': 'mse: squared error of the MAE',
              'irm': 'irm: relations of the MAE'}
    for panel, (loss, title) in zip(figure.subplots(1, 3), titles.items()):
        curves = {name: [(entry['step'], entry[loss]) for entry in entries
                         if isinstance(entry.get(loss), float)]
                  for name, entries in trainings.items()}
        curves = {name: points for name, points in curves.items() if points}
        for name, colour in colours_of(curves).items():
            panel.plot(*zip(*curves[name]), color=colour, label=name)
        panel.set(xlabel='step', title=title)
        if curves:                                         # else it warns
            panel.legend(frameon=False, fontsize=7, loc='upper center',
                         bbox_to_anchor=(0.5, -0.15))
    save_plot(figure, path)


def save_tradeoff(rows, path):
    """Leakage of Rows, a colour each, against utility, a panel a question."""
    rows = [row for row in rows
            if any(row.figures('privacy')) and row.results[0]['verification']]
    if not rows:
        return
    figure = new_figure(figsize=(10, 4.2))
    panels = figure.subplots(1, 2, sharey=True)
    attackers, colours = comparable(rows), colours_of([row.name for row in rows])
    sets = rows[0].results[0]['verification']
    for panel, (word, question) in zip(panels, QUESTIONS.items()):
        for row in rows:
            accuracy, colour = 100 * row.accuracy(sets), colours[row.name]
            strongest, judge = (100 * row.strongest(question, who).rank1
                                for who in (attackers, ['judge']))
            panel.plot([judge, strongest], [accuracy] * 2, '-', color=colour, lw=1)
            panel.plot(judge, accuracy, 'o', color=colour, ms=5)
            panel.plot(strongest, accuracy, 's', color=colour, ms=6, label=row.name)
        chances = [figures['chance'] for name, figures in rows[0].results[0]['privacy'].items()
                   if name.endswith(question)]
        if chances:
            panel.axvline(100 * chances[0], color='grey', ls=':', lw=1, label='chance')
        panel.set(xlabel=f'{word} is found first, %')
    panels[0].set_ylabel('verification accuracy, mean of sets, %')
    panels[0].set_title('square: strongest attack, dot: judge', loc='left', fontsize=8)
    panels[1].legend(**LEGEND)
    save_plot(figure, path)

"""Pictures of a run: grids of faces, ROC, score histogram, privacy against utility."""
from pathlib import Path

import torch
from torchvision.io import write_png
from torchvision.utils import make_grid

import runtime

SURE = '#1b6ca8', '#d1495b', '#66a182', '#edae49', '#5d576b', '#8d96a3'


def save_grid(image_rows, path):
    """Write a picture of several rows of images, each a float tensor (N, 3, H, W) in 0..1."""
    images = torch.cat([row.detach().float().cpu() for row in image_rows]).clamp(0, 1)
    grid = make_grid(images, nrow=len(image_rows[0]), padding=2, pad_value=1)
    if grid.shape[1] < 400:           # small faces would be a stamp on a screen
        grid = grid.repeat_interleave(2, 1).repeat_interleave(2, 2)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    write_png((grid * 255).round().byte(), str(temporary))
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


def save_plot(figure, axes, path, x, y):
    axes.set(xlabel=x, ylabel=y)
    axes.spines[['top', 'right']].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120, bbox_inches='tight')


def verification_plots(curves, folder):
    """ROC and score histograms; `curves` = {name: (distances (P,), same (P,) bool) numpy}."""
    plt = plotting()
    if not plt:
        return
    figure, axes = plt.subplots(figsize=(5, 4))
    for (name, (distance, same)), colour in zip(curves.items(), SURE * 9):
        order = distance.argsort()
        tar = same[order].cumsum() / same.sum()
        far = (~same[order]).cumsum() / (~same).sum()
        axes.plot(far, tar, label=name, color=colour)
    axes.set_xscale('log')
    axes.set_xlim(1e-3, 1)
    save_plot(figure, axes, folder / 'roc.png', 'false accept rate', 'true accept rate')
    figure, panels = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 3), sharey=True,
                                  squeeze=False)
    for panel, (name, (distance, same)) in zip(panels[0], curves.items()):
        for kind, colour, label in ((same, SURE[0], 'same person'), (~same, SURE[1], 'others')):
            panel.hist(1 - distance[kind] / 2, 40, (-1, 1), density=True, alpha=0.6,
                       color=colour, label=label)
        panel.set_title(name)
        save_plot(figure, panel, folder / 'scores.png', 'cosine', '')
    plt.close('all')


def tradeoff_plot(points, chance, folder):
    """Leakage against utility; `points` = {row: (accuracy, {attack: rank-1})}, in 0..1."""
    plt = plotting()
    if not plt:
        return
    figure, axes = plt.subplots(figsize=(5.5, 4))
    for row, (accuracy, leakage) in points.items():
        for (attack, rank1), marker in zip(leakage.items(), 'os^Dv'):
            axes.plot(100 * rank1, 100 * accuracy, marker, color=SURE[list(points).index(row) % 6],
                      label=attack if row == next(iter(points)) else None)
        axes.annotate(row, (100 * max(leakage.values()), 100 * accuracy), xytext=(6, 4),
                      textcoords='offset points')
    axes.axvline(100 * chance, color='grey', ls=':', lw=1)
    save_plot(figure, axes, folder / 'tradeoff.png',
              'originals found first from their released image, %', 'verification accuracy, %')
    plt.close('all')

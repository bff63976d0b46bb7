"""Stage 4 of FaceMAE: what a release is worth, and what it gives away.

    python evaluate.py                                   # the student of the toy run
    python evaluate.py --config configs/casia.yaml
    python evaluate.py --compare                         # all rows, one table
    python evaluate.py evaluate.model=backbone.pth evaluate.sets=[lfw.bin]   # any recogniser
    python evaluate.py release=PATH originals=PATH       # anybody's release, same order

Reads   evaluate.sets (.bin), <run>/<row>/fr.pt, <run>/<row>/reconstructed, <run>/fold<k>/judge.pt
Writes  <run>/<row>/results.json (external.json for others' models and releases),
        with --compare all rows in <run>/results.json, and <run>/figures/*.png

Utility is insightface's ten-fold verification. Leakage is retrieval: how often the original of a
released image (same image), or another photo of its person (same person), comes first among all
private originals. Attackers: judge = a recogniser of other people that is not the teacher,
pixels = the nearest neighbour in 16 x 16 contrast-normalised pixels, insider = a recogniser
trained on the release itself, teacher = the one that shaped the release.
"""
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import attacks
import data
import embed
import figures
import models
import records
import runtime
from config import as_dict, rows
from records import InputError
from reconstruct import (check_release, fingerprint, private_digest, release_order,
                         release_secret)

FOLDS = 10


# ---------------------------------------------------------------------------- verification

def fold_accuracies(distance, same):
    """Ten-fold accuracies of insightface's protocol, float64 (10,).

    distance (P,): squared L2 distances of unit embeddings, 0..4; same (P,) bool. Thresholds 0..4
    by 0.01, 'same' when distance < threshold, first best threshold of the other nine contiguous
    folds. All thresholds and folds come from one histogram.
    """
    thresholds = np.arange(0, 4, 0.01)
    first = np.searchsorted(thresholds, distance, side='right')     # threshold that accepts it
    sizes = np.full(FOLDS, len(same) // FOLDS)
    sizes[:len(same) % FOLDS] += 1
    fold = np.repeat(np.arange(FOLDS), sizes)
    # +1 for a same pair that becomes right, -1 for a different pair that becomes wrong
    change = np.zeros((FOLDS, len(thresholds) + 1), np.int64)
    np.add.at(change, (fold, first), np.where(same, 1, -1))
    different = np.bincount(fold[~same], minlength=FOLDS)
    right = change[:, :-1].cumsum(1) + different[:, None]            # (fold, threshold)
    best = (right.sum(0) - right).argmax(1)
    return right[np.arange(FOLDS), best] / sizes


def tar_at_far(distance, same, far):
    """Share of same pairs accepted at the loosest threshold that accepts at most `far` of the
    different pairs (floor(far * count) of them; no interpolation)."""
    others = np.sort(distance[~same])
    allowed = int(far * len(others))
    return float((distance[same] < others[min(allowed, len(others) - 1)]).mean())


def auc(distance, same):
    """Area under the ROC: chance that a same pair is closer than a different one (ties half)."""
    others, own = np.sort(distance[~same]), distance[same]
    closer = len(others) - np.searchsorted(others, own, 'right')
    ties = np.searchsorted(others, own, 'right') - np.searchsorted(others, own, 'left')
    return float((closer + ties / 2).mean() / len(others))


def find_set(name, cfg):
    """Path of a verification set: as it stands, or beside the training data."""
    root = Path(cfg.data.root)
    places = [Path(name), (root.parent if root.suffix == '.rec' else root) / name]
    return next((p for p in places if p.is_file()), places[0])


def load_pairs(path, cfg):
    """A verification set: distinct images uint8 (M, S, S, 3), pairs int64 (P, 2), same (P,)."""
    encoded, same = records.read_bin(path)
    number = {}
    where = np.array([number.setdefault(bytes(e), len(number)) for e in encoded])
    images = np.stack([data.pixels(e, f'{path} image {i} (from 0)', cfg.data.size, 'resize')
                       for i, e in enumerate(number)])
    return images, where.reshape(-1, 2), same


def unit_embeddings(net, images, chosen, cfg, device):
    """f(x) + f(mirrored x) of images[chosen], L2-normalised, float32 (N, d)."""
    store = data.Store(images, chosen, device)
    plain, mirrored = embed.embed_all(net, store, cfg.evaluate.batch, cfg.run.precision)
    return F.normalize(plain + mirrored)


def verify(net, sets, cfg, device):
    """Verification of a recogniser on each set: results by name, and the distances of each."""
    results, curves = {}, {}
    for path, (images, pairs, same) in sets.items():
        z = unit_embeddings(net, images, range(len(images)), cfg, device).double().cpu().numpy()
        distance = np.square(z[pairs[:, 0]] - z[pairs[:, 1]]).sum(1)
        accuracy = fold_accuracies(distance, same)
        results[Path(path).stem] = {
            'accuracy': accuracy.mean(), 'std': accuracy.std(), 'auc': auc(distance, same),
            'tar@far=1e-2': tar_at_far(distance, same, 1e-2),
            'tar@far=1e-3': tar_at_far(distance, same, 1e-3), 'pairs': len(same),
            'sha256': hashlib.sha256(Path(path).read_bytes()).hexdigest()}
        curves[Path(path).stem] = distance, same
    return results, curves


def image_quality(made, originals, device):
    """PSNR, dB, and SSIM (Wang et al. 2004: 11 x 11 Gaussian, sigma 1.5; grey), mean of images."""
    line = torch.exp(-torch.arange(-5.0, 6.0) ** 2 / (2 * 1.5 ** 2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None].to(device)
    psnr, ssim = [], []
    for a, b in zip(np.array_split(made, len(made) // 256 + 1),
                    np.array_split(originals, len(made) // 256 + 1)):
        a, b = (torch.as_tensor(t).to(device).permute(0, 3, 1, 2).double() for t in (a, b))
        error = (a - b).square().mean((1, 2, 3)).clamp(min=1e-10)
        psnr.append(10 * torch.log10(255 ** 2 / error))
        a, b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
        mean_a, mean_b, aa, bb, ab = (F.conv2d(t, window.double()) for t in
                                      (a, b, a * a, b * b, a * b))
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        value = ((2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2) /
                 ((mean_a ** 2 + mean_b ** 2 + c1) *
                  (aa - mean_a ** 2 + bb - mean_b ** 2 + c2)))
        ssim.append(value.mean((1, 2, 3)))
    return {'psnr': torch.cat(psnr).mean().item(), 'ssim': torch.cat(ssim).mean().item()}


def load_release(row):
    """The released images of a row, or those of somebody else."""
    path = Path(row.cfg.release or row.folder / 'reconstructed')
    if not path.exists():
        raise InputError(f'{path} is missing: ' + ('check the path' if row.cfg.release else
                         f'first run `{runtime.again("reconstruct.py")}`'))
    return data.load(path, row.cfg)


def released_pairs(row, folds, made):
    """Released images beside their originals, a group for each fold as leakage() takes them."""
    cfg = row.cfg
    if cfg.release or cfg.originals:
        if not (cfg.release and cfg.originals):
            raise InputError('release and originals belong together: give both paths')
        whole = data.load(cfg.originals, cfg)
        if len(made.labels) != len(whole.labels):
            raise InputError(f'release has {len(made.labels)} images and originals '
                             f'{len(whole.labels)}: both need the same, in one order')
        image = np.arange(len(whole.labels))
        galleries, fold = [image], np.zeros(len(image), int)
    else:
        whole, secret = folds[0].private_data, release_secret(cfg)
        check_release(row.folder / 'reconstructed',
                      {'images': private_digest(folds), 'secret': fingerprint(secret)}, cfg)
        fold, image, _ = release_order(folds, secret, cfg.reconstruct.images_per_person)
        galleries = [f.private for f in folds]
    chosen = np.arange(len(image))
    if cfg.evaluate.probes and cfg.evaluate.probes < len(chosen):
        chosen = np.sort(np.random.default_rng(0).permutation(chosen)[:cfg.evaluate.probes])
    groups = []
    for k, gallery in enumerate(galleries):
        mine = chosen[fold[chosen] == k]
        groups.append(SimpleNamespace(
            released=(made.images, mine), originals=(whole.images, gallery),
            source=np.searchsorted(gallery, image[mine]), person=whole.labels[gallery]))
    return groups


def attackers(row, folds, student, device):
    """The attackers of evaluate.attacks: {name: [(what it depends on, embedder) of each fold]}."""
    cfg = row.cfg

    def embedder(net):
        return lambda images, chosen: unit_embeddings(net, images, chosen, cfg, device)

    def public(role):
        found = []
        for k in [f.k for f in folds] or [0]:
            path = getattr(cfg, role).checkpoint or f'{cfg.run.folder}/fold{k}/{role}.pt'
            net = embed.recogniser(path, device, runtime.again('train_fr.py', f'stage={role}'))
            found.append((f'{path} {k}', embedder(net)))
        return found

    def pixels():
        return [(f'pixels {k}', lambda images, chosen: attacks.pixel_embeddings(
            images, chosen, device)) for k in range(len(folds) or 1)]

    def insider():
        return [(f'{row.folder} {k}', embedder(student)) for k in range(len(folds) or 1)]

    known = {'judge': lambda: public('judge'), 'teacher': lambda: public('teacher'),
             'pixels': pixels, 'insider': insider}
    unknown = sorted(set(cfg.evaluate.attacks) - set(known))
    if unknown:
        raise InputError(f'evaluate.attacks has {unknown[0]!r}: choose from '
                                 f'{", ".join(known)}')
    return {name: known[name]() for name in cfg.evaluate.attacks}


def evaluate(row, folds, sets, galleries, device):
    """Everything about one row, written to its results.json; also the distances for the plots."""
    cfg = row.cfg
    path, name = row.folder / 'fr.pt', 'results.json'
    if cfg.evaluate.model or cfg.release:        # others' work does not overwrite the run's own
        path, name = cfg.evaluate.model or path, 'external.json'
    student = embed.recogniser(path, device, runtime.again('train_fr.py')) if (
        not cfg.release or Path(path).exists()) else None
    made = load_release(row) if cfg.release or folds else None
    if student and made and not cfg.evaluate.model and data.digest(
            made, np.arange(len(made.labels))) != runtime.load(path)['images']:
        if not cfg.release:
            raise InputError(f'{path} was trained on another release: delete it and run '
                             f'`{runtime.again("train_fr.py")}`')
        student = None
    if cfg.release and not student:
        cfg.evaluate.attacks = [a for a in cfg.evaluate.attacks if a != 'insider']
        runtime.say(f'no recogniser of {cfg.release} in {path}: no utility and no insider (first '
                    f'run `{runtime.again("train_fr.py")}` with another run.folder)')
    results, curves = {'row': row.name, 'seed': cfg.run.seed, 'verification': {}}, {}
    if student:
        results['verification'], curves = verify(student, sets, cfg, device)
    if made:
        groups = released_pairs(row, folds, made)
        results['privacy'] = attacks.leakage(groups, attackers(row, folds, student, device),
                                             galleries, device)
        results['reconstruction'] = image_quality(
            np.concatenate([g.released[0][g.released[1]] for g in groups]),
            np.concatenate([g.originals[0][g.originals[1][g.source]] for g in groups]), device)
    results |= {'seconds': stage_seconds(Path(cfg.run.folder)),
                'made_with': runtime.provenance(), 'config': as_dict(cfg)}
    row.folder.mkdir(parents=True, exist_ok=True)
    runtime.write_json(row.folder / name, results)
    return results, curves


def stage_seconds(run):
    """Wall time of each stage, from log.jsonl: an interrupted stage is the sum of its pieces."""
    total, last = {}, {}
    log = run / 'log.jsonl'
    for line in log.read_text().splitlines() if log.exists() else []:
        entry = json.loads(line)
        stage, seconds = entry['stage'], entry['seconds']
        total[stage] = total.get(stage, 0) + seconds - (
            last.get(stage, 0) if seconds > last.get(stage, 0) else 0)
        last[stage] = seconds
    return {stage: round(seconds, 1) for stage, seconds in total.items()}


def floors(cfg, sets, device):
    """What recognisers reach that learnt nothing: an untrained net of each seed.

    Its BatchNorms take the statistics of test images, without which a deep net overflows.
    """
    results, some = [], next(iter(sets.values()))[0][:256]
    for seed in cfg.compare_seeds or [cfg.run.seed]:
        torch.manual_seed(seed)
        net = models.iresnet(cfg.fr.depth, cfg.fr.width, cfg.data.size, cfg.fr.dim).to(device)
        for norm in (m for m in net.modules() if hasattr(m, 'running_mean')):
            norm.momentum = 1.0
        embed.embed_batch(net, torch.from_numpy(some).to(device), 'fp32')
        results.append({'verification': verify(net.eval(), sets, cfg, device)[0]})
    return results


def tables(found):
    """The comparison as two tables of per cents: `found` = {row: [results of each seed]}."""
    def cell(values):
        values = 100 * np.array(values)
        return f'{values.mean():.1f}' + (f' ±{values.std(ddof=1):.1f}' if len(values) > 1 else '')

    def start(title, columns):
        shown = Table(title=title, title_justify='left')
        shown.add_column('released set', no_wrap=True)
        for column in columns:
            shown.add_column(column, justify='right')
        return shown

    measures = {'acc.': 'accuracy', 'AUC': 'auc', 'TAR@FAR 1%': 'tar@far=1e-2'}
    names = list(next(iter(found.values()))[0]['verification'])
    utility = start('utility: verification of other people, %',
                    [f'{name} {measure}' for name in names for measure in measures])
    for row, results in found.items():
        utility.add_row(row, *(cell([r['verification'][n][key] for r in results])
                               for n in names for key in measures.values()))
    released = {row: results for row, results in found.items() if 'privacy' in results[0]}
    if not released:
        return [utility]
    chance = next(iter(released.values()))[0]['privacy']
    leakage = start('leakage: the original, or another photo of the person, is found first, %',
                    [*(a.replace('_', ' ') for a in chance), 'PSNR, dB'])
    for row, results in released.items():
        leakage.add_row(row, *(cell([r['privacy'][a]['rank1'] for r in results]) for a in chance),
                        f'{np.mean([r["reconstruction"]["psnr"] for r in results]):.1f}')
    leakage.add_row('chance', *(f'{100 * a["chance"]:.2f}' for a in chance.values()), '')
    return [utility, leakage]


def main(cfg, device, compare=False):
    if cfg.evaluate.model:                   # a published net sees the pairs at its own size
        cfg.data.size = embed.recogniser(cfg.evaluate.model, device).size
    sets = {path: load_pairs(path, cfg) for path in
            (find_set(name, cfg) for name in cfg.evaluate.sets)}
    folds = [] if cfg.evaluate.model or cfg.release else data.split(cfg)
    found, curves, galleries = {}, {}, {}
    if compare:
        found['untrained net'] = floors(cfg, sets, device)
    for row in rows(cfg, compare):
        results, distances = evaluate(row, folds, sets, galleries, device)
        found.setdefault(row.name, []).append(results)
        if distances:
            curves.setdefault(row.name, next(iter(distances.values())))
    if runtime.rank():
        return
    shown = tables(found)
    Console().print(*shown)
    run = Path(cfg.run.folder)
    (run / 'figures').mkdir(parents=True, exist_ok=True)
    if curves:
        figures.verification_plots(curves, run / 'figures')
    if compare:
        own = next((r for r in found[next(rows(cfg, False)).name] if r['seed'] == cfg.run.seed), {})
        runtime.write_json(run / 'results.json', {'rows': found, **own})
        with open(run / 'table.txt', 'w') as f:
            Console(file=f, width=120).print(*shown)
        points = {name: (np.mean([next(iter(r['verification'].values()))['accuracy'] for r in rs]),
                         {a: np.mean([r['privacy'][f'{a}_same_image']['rank1'] for r in rs])
                          for a in cfg.evaluate.attacks})
                  for name, rs in found.items() if 'privacy' in rs[0]}
        chance = next(r[0]['privacy'] for r in found.values() if 'privacy' in r[0])
        chance = next(iter(chance.values()))['chance']
        figures.tradeoff_plot(points, chance, run / 'figures')


if __name__ == '__main__':
    runtime.launch(main, __doc__, [('compare', 'evaluate all rows of compare in one table')])

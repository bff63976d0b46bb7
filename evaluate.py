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
private originals, for the attackers of evaluate.attacks; the table says what each of them has.
"""
import contextlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console

import attacks
import batches
import checkpoint
import data
import embed
import figures
import models
import runtime
from checkpoint import fingerprint, release_secret, secret_seed
from config import as_dict, rows
from reconstruct import STRENGTH, check_release, load_maes, premises_of, protect, release_order
from records import InputError
from verification import (component_floor, find_set, floors, held_back, load_pairs, pair_distances,
                          paired_difference, threshold_at_far, unit_embeddings, verify)


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


def probes_of(cfg, count):
    """Which of `count` released images are searched for: all, or a fixed random choice."""
    chosen = np.random.default_rng(0).permutation(count)
    return np.sort(chosen[:cfg.evaluate.probes or count])


def own_groups(row, folds, made, device):
    """The private people of each fold as attackers meet them: groups as attacks.py wants them.

    The attackers' pairs are public people, whom the fold's own model protects for them.
    """
    cfg, c, whole, secret = row.cfg, row.cfg.reconstruct, folds[0].private_data, release_secret(
        row.cfg)
    maes = load_maes(row, folds, device)
    check_release(row.folder / 'reconstructed', premises_of(row, folds, secret), cfg)
    fold, image, _ = release_order(folds, secret, c.images_per_person)
    chosen, seed = probes_of(cfg, len(image)), secret_seed(secret, f'masks {cfg.run.seed}')
    draws = c.method in ('facemae', 'mask', 'noise')
    # Equal in all folds, so that curves can be pooled
    pairs = len(probes_of(cfg, min(len(f.train) for f in folds)))

    def group(k, f):
        mine = chosen[fold[chosen] == k]

        def protected(images, numbers, seed):
            return np.concatenate([protect(
                torch.from_numpy(np.asarray(images[part])).to(device),
                torch.as_tensor(part, device=device), seed, cfg, maes[k]).cpu().numpy()
                for part in np.array_split(numbers, len(numbers) // c.batch + 1)])

        known = f.train[np.random.default_rng(1).permutation(len(f.train))][:pairs]
        hidden = None
        if STRENGTH.get(c.method) == 'mask_ratio':
            noise = batches.hashed(seed, 0, image[mine], (cfg.data.size // cfg.mae.patch) ** 2)
            hidden = models.random_masking(noise, c.mask_ratio)[2]
        people = f.data.labels[known]
        outside = np.setdiff1d(np.flatnonzero(data.not_excluded(whole, cfg)),
                               np.concatenate([g.private for g in folds]))
        return SimpleNamespace(
            released=(made.images, mine), originals=(whole.images, f.private), seen={},
            source=np.searchsorted(f.private, image[mine]), person=whole.labels[f.private],
            pair_people=people if f.data is whole else -1 - people, hidden=hidden,
            pairs=lambda some, seed: (protected(f.data.images, known[some], seed),
                                      np.asarray(f.data.images[known[some]])),
            again=(lambda seed: protected(whole.images, image[mine], seed)) if draws else None,
            outsiders=(whole.images, outside[probes_of(cfg, len(outside))]))

    return [group(k, f) for k, f in enumerate(folds)]


def foreign_groups(cfg, made, device):
    """Somebody's release beside its originals, as two groups: half of the people are attacked by
    those who know the released images of the other half."""
    if not (cfg.release and cfg.originals):
        raise InputError('release and originals belong together: give both paths')
    whole = data.load(cfg.originals, cfg)
    if len(made.labels) != len(whole.labels) or made.skipped != whole.skipped:
        raise InputError(f'release has {len(made.labels)} good images and originals '
                         f'{len(whole.labels)}: both need the same, in one order')
    people = np.unique(whole.labels)
    half = np.isin(whole.labels, people[data.ordered_by_hash(people, 0)[::2]])
    chosen = probes_of(cfg, len(half))
    pairs = len(probes_of(cfg, min(half.sum(), (~half).sum())))

    def group(rows, known):
        mine = chosen[np.isin(chosen, rows)]
        known = np.random.default_rng(1).permutation(known)[:pairs]
        return SimpleNamespace(
            released=(made.images, mine), originals=(whole.images, rows), seen={}, hidden=None,
            source=np.searchsorted(rows, mine), person=whole.labels[rows], again=None,
            outsiders=None, pair_people=whole.labels[known], pairs=lambda some, seed: (
                np.asarray(made.images[known[some]]), np.asarray(whole.images[known[some]])))

    return [group(np.flatnonzero(half == side), np.flatnonzero(half != side))
            for side in (True, False)]


def attackers(row, groups, folds, student, sets, galleries, device):
    """The attacks of evaluate.attacks on each group: {name: [attack of each group]}."""
    cfg, wanted = row.cfg, row.cfg.evaluate.attacks
    numbers = range(len(groups))

    def eye(net, key):
        seen = galleries.setdefault(key, {})
        if 'threshold' not in seen:        # FAR 1e-3 on real pairs of people in no training
            seen['threshold'] = np.inf
            for images, pairs, same in list(sets.values())[:1]:
                z = unit_embeddings(net, images, range(len(images)), cfg, device)
                distance = pair_distances(z, pairs)
                seen['threshold'] = 1 - threshold_at_far(distance, same, 1e-3) / 2
        return SimpleNamespace(
            key=key, net=net, seen=seen, threshold=seen['threshold'],
            embed=lambda images, rows: unit_embeddings(net, images, rows, cfg, device))

    def public(role, checkpoint):
        paths = [checkpoint or f'{cfg.run.folder}/fold{f.k}/{role}.pt' for f in folds] or [
            checkpoint or f'{cfg.run.folder}/fold0/{role}.pt' for _ in numbers]
        return [eye(embed.recogniser(path, device, runtime.again('train_fr.py', f'stage={role}')),
                    f'{path} {n}') for n, path in enumerate(paths)]

    pixels = [SimpleNamespace(
        key=f'pixels {n}', seen=galleries.setdefault(f'pixels {n}', {}), threshold=np.inf,
        embed=lambda images, rows: attacks.pixel_embeddings(images, rows, device))
        for n in numbers]
    judges = public('judge', cfg.judge.checkpoint) if set(wanted) & {
        'judge', 'linear', 'trained', 'class', 'repeated'} else []
    known = {
        'judge': lambda n: partial(attacks.stock, judges[n]),
        'pixels': lambda n: partial(attacks.stock, pixels[n]),
        'insider': lambda n: partial(attacks.stock, eye(student, f'{row.folder} {n}')),
        'masked': lambda n: partial(attacks.patchwork, device=device),
        'visible': lambda n: partial(attacks.patchwork, device=device, original=True),
        'linear': lambda n: partial(attacks.linear, judges[n]),
        'trained': lambda n: partial(attacks.trained, judges[n], cfg=cfg, device=device),
        'class': lambda n: partial(attacks.by_class, (judges[n], pixels[n])),
        'repeated': lambda n: partial(attacks.repeated, (judges[n], pixels[n]))}
    found = {}
    for name in wanted:
        if name == 'teacher' or Path(name).is_file():
            eyes = public('teacher', cfg.teacher.checkpoint if name == 'teacher' else name)
            found[Path(name).stem] = [partial(attacks.stock, e) for e in eyes]
        elif name in known:
            found[name] = [known[name](n) for n in numbers]
        elif name != 'membership':
            raise InputError(f'evaluate.attacks has {name!r}: choose from teacher, membership, '
                             f'{", ".join(known)}, or name an insightface backbone')
    return found


def privacy(row, folds, student, made, sets, galleries, device):
    """All attacks on one release: figures by attack, cosines for the histogram, and image pairs
    (released, original) of all probes, uint8 (N, H, W, 3) each."""
    cfg, wanted = row.cfg, row.cfg.evaluate.attacks
    groups = (foreign_groups(cfg, made, device) if cfg.release else
              own_groups(row, folds, made, device))
    for g in groups:                    # an attacker who learnt from his victims proves nothing
        if shared := set(g.pair_people) & set(g.person):
            raise InputError(f'person {min(shared)} is attacked and in an attacker\'s training: '
                             'this is an error of the split, please report it')
    found, cosines = attacks.leakage(
        groups, attackers(row, groups, folds, student, sets, galleries, device), device)
    if 'membership' in wanted:
        if cfg.reconstruct.method == 'facemae' and folds:
            found['membership_reconstruction'] = attacks.reconstruction_membership(groups)
        if student and folds and len(groups[0].outsiders[1]):
            head = checkpoint.load(row.folder / 'fr.pt')['head']['weight']
            centres = F.normalize(head).to(device)
            found['membership_recogniser'] = attacks.recogniser_membership(
                lambda images, rows: unit_embeddings(student, images, rows, cfg, device)
                @ centres.T, groups)
    pairs = [np.concatenate([np.asarray(images[rows]) for images, rows in side]) for side in (
        [g.released for g in groups],
        [(g.originals[0], g.originals[1][g.source]) for g in groups])]
    return found, cosines, pairs


def attacked(row, folds, path):
    """What the attacks on a row depend on, in 64 hex digits: results that bear them are kept."""
    cfg = row.cfg
    nets = [cfg.judge.checkpoint, cfg.teacher.checkpoint, *cfg.evaluate.attacks, path] + [
        net for f in folds for net in (row.mae(f.k), *(
            Path(cfg.run.folder) / f'fold{f.k}' / f'{role}.pt' for role in ('judge', 'teacher')))]
    config = {k: v for k, v in as_dict(cfg).items() if 'compare' not in k}
    code = b''.join(p.read_bytes() for p in sorted(Path(__file__).parent.glob('*.py')))
    machine = {k: v for k, v in runtime.provenance().items() if k != 'commit'}
    nets = [fingerprint(Path(net).read_bytes()) for net in nets if Path(net).is_file()]
    return fingerprint(repr([config, fingerprint(code), machine, data.private_digest(folds),
                             fingerprint(release_secret(cfg)), nets]).encode())


def evaluate(row, folds, sets, galleries, device):
    """Everything about one row, written to its results.json; also the distances for the plots.

    A row that was attacked before by the same code, nets and settings keeps those results."""
    cfg = row.cfg
    path, name = row.folder / 'fr.pt', 'results.json'
    if cfg.evaluate.model or cfg.release:        # others' work does not overwrite the run's own
        path, name = cfg.evaluate.model or path, 'external.json'
    student = embed.recogniser(path, device, runtime.again('train_fr.py')) if (
        not cfg.release or Path(path).exists()) else None
    made = data.load_release(row) if cfg.release or folds else None
    if student and made and not cfg.evaluate.model and data.digest(
            made, np.arange(len(made.labels))) != checkpoint.load(path)['images']:
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
    kept = {}
    if made and not cfg.release:
        results['attacked'] = attacked(row, folds, path)
        with contextlib.suppress(InputError):              # missing or damaged: made again
            before = checkpoint.read_json(row.folder / name)
            kept = before if before.get('attacked') == results['attacked'] else {}
    if kept:
        runtime.say(f'the attacks of {row.folder / name} are kept')
        results |= {key: kept[key] for key in ('privacy', 'reconstruction')}
    elif made:
        results['privacy'], cosines, (released, originals) = privacy(
            row, folds, student, made, sets, galleries, device)
        results['reconstruction'] = image_quality(released, originals, device)
        if runtime.rank() == 0:
            figures.privacy_pictures(results['privacy'], cosines, released, originals,
                                     Path(cfg.run.folder) / 'figures', cfg.run.row or 'release')
    results |= {'seconds': runtime.stage_seconds(Path(cfg.run.folder)),
                'made_with': runtime.provenance(), 'config': as_dict(cfg)}
    row.folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(row.folder / name, results)
    return results, curves


def main(cfg, device, compare):
    if cfg.evaluate.model:                   # a published net sees the pairs at its own size
        cfg.data.size = embed.recogniser(cfg.evaluate.model, device).size
    paths = dict.fromkeys(find_set(name, cfg) for name in cfg.evaluate.sets)
    if len({Path(path).stem for path in paths}) < len(paths):
        raise InputError(f'evaluate.sets = {cfg.evaluate.sets} has two sets of one name, which '
                         'is all that tells them apart: rename a file')
    sets = {path: load_pairs(path, cfg) for path in paths}
    folds = [] if cfg.evaluate.model or cfg.release else data.split(cfg)
    if len(folds) == 1 and len(folds[0].validation):
        sets['held back'] = held_back(folds[0])
    found, distances, galleries = {}, {}, {}
    if compare and sets and folds:
        found['untrained net'] = floors(cfg, sets, device)
        whole = folds[0].private_data
        used = np.flatnonzero(data.not_excluded(whole, cfg))
        found['pixel components'] = component_floor(
            whole.images[used[::len(used) // 5000 + 1]], sets)
    every = list(rows(cfg, compare))
    ready = [row for row in every if (row.folder / 'fr.pt').exists()] or every
    if later := [f'{row.name} (seed {row.cfg.run.seed})' for row in every if row not in ready]:
        runtime.say(f'without a student yet, left out: {", ".join(later)}')
    for row in ready:
        results, curves = evaluate(row, folds, sets, galleries, device)
        found.setdefault(row.name, []).append(results)
        for name, (distance, same) in curves.items():
            distances.setdefault(name, (same, {}))[1].setdefault(
                row.name, {})[row.cfg.run.seed] = distance
    if runtime.rank():
        return
    shown = figures.tables(found)
    run = Path(cfg.run.folder)
    (run / 'figures').mkdir(parents=True, exist_ok=True)
    for same, of_rows in list(distances.values())[:1]:
        figures.verification_plots({row: (next(iter(seeds.values())), same)
                                    for row, seeds in of_rows.items()}, run / 'figures')
    if compare:
        method, ahead = every[0].name, {}
        for name, (same, of_rows) in distances.items():
            ours = of_rows.pop(method, {})
            for row, theirs in of_rows.items():
                if gain := paired_difference(ours, theirs, same):
                    ahead.setdefault(row, {})[name] = gain
        gains = figures.differences(ahead, method)
        shown[len(gains):len(gains)] = gains             # after as many tables of utility
        own = next((r for r in found.get(method, []) if r['seed'] == cfg.run.seed), {})
        checkpoint.write_json(run / 'results.json', {'rows': found, 'ahead': ahead, **own})
        with open(run / 'table.txt.tmp', 'w') as f:
            Console(file=f, width=120).print(*shown)
        (run / 'table.txt.tmp').replace(run / 'table.txt')
        released = {name: r for name, r in found.items() if 'privacy' in r[0]}
        figures.tradeoff_plot(released, run / 'figures')
        figures.effort_plots(released, run / 'figures')
    Console().print(*shown)


if __name__ == '__main__':
    runtime.launch(main, __doc__, 'evaluate all rows of compare in one table')

# SPDX-License-Identifier: MIT
"""Stage 4 of FaceMAE: what a release is worth, and what it gives away.

    python evaluate.py                                   # the student of the toy run
    python evaluate.py --config configs/casia.yaml
    python evaluate.py --compare                         # all rows, one table
    python evaluate.py evaluate.model=backbone.pth "evaluate.sets=[lfw.bin]"   # any recogniser
    python evaluate.py configs/casia.yaml run.folder=runs/theirs release=PATH originals=PATH
                                                         # anybody's release, same order

Reads   evaluate.sets (.bin), <run>/<row>/fr.pt, <run>/<row>/reconstructed, <run>/fold<k>/judge.pt
Writes  <run>/<row>/results.json (external.json for others' models and releases),
        with --compare all rows in <run>/results.json, table.txt and report.html (one page),
        and <run>/figures/*.png

Utility is insightface's ten-fold verification. Leakage is retrieval: how often the original of a
released image (same image), or another photo of its person (same person), comes first among the
private originals of its fold, for the attackers of evaluate.attacks; the table says what each of
them has.
"""
import facekit.start  # noqa: F401 (first: says what is not installed)

import contextlib
import functools
import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console

from facekit import attacks, batches, embed, faces, files, keys, plots, protect, report, run
from facekit import verification
from facekit.attack_data import Owned, Recognisers, foreign_groups, own_groups
from facekit.check import check_experiment, check_release_images
from facekit.config import as_dict, variants
from facekit.errors import InputError
from facekit.images import psnr_and_ssim
from facekit.page import write_page
from facekit.progress import StageLog, stage_seconds
from facekit.published import is_published, versions
from facekit.split import count_release, not_excluded, split


# ------------------------------------------------------------------------------ one release

def evaluate(variant, folds, sets, recognisers, device):
    """Everything about one row, written to its results; returns them and its PairScores by set.

    sets: PairSets; recognisers: Recognisers. Results of others' releases and models have a file
    of their own.
    """
    cfg = variant.cfg
    path = path_of_results(variant)
    with files.only_writer(path):
        student, learnt_from = load_student(variant, device)
        release = faces.load_release(variant) if cfg.release or folds else None
        if student and release and not cfg.evaluate.model:
            student = student if fits(variant, learnt_from, release) else None
        results, scores = {'row': variant.name, 'seed': variant.seed, 'verification': {}}, {}
        if student:
            results['verification'], scores = verification.verify(student, sets, cfg, device)
        if release:
            results |= leakage(variant, folds, release, student, path, recognisers, device)
        if folds:
            results |= {'people': asdict(count_release(folds, cfg)),
                        'left_out': {side: getattr(folds[0], side).left_out()
                                     for side in ('private', 'public')}}
        results |= {'seconds': stage_seconds(variant.run), 'made_with': run.provenance(device),
                    'config': files.public_dict(cfg)}
        files.write_json(path, results)
    return results, scores


def path_of_results(variant):
    """Where the figures of a row go, those of others' models and releases apart."""
    external = variant.cfg.evaluate.model or variant.cfg.release
    return variant.folder / 'external.json' if external else variant.results


def load_student(variant, device):
    """The recogniser that is evaluated and the digest of the images it learnt from; None and ''
    where a foreign release has no recogniser of its own."""
    cfg, path = variant.cfg, variant.student
    if cfg.evaluate.model:
        return foreign_recogniser(cfg, device), ''
    if cfg.release and not run.on_rank_0(path.exists):
        say_no_student(variant)
        return None, ''
    saved = files.load_finished(path, run.command('train_fr.py'))
    learnt_from = files.entry(saved, 'made_from').get('set of images')
    return embed.recogniser_from(saved, path, device), learnt_from


def foreign_recogniser(cfg, device):
    """The recogniser of evaluate.model."""
    return embed.recogniser(cfg.evaluate.model, device, onnx_pixels=cfg.evaluate.onnx_pixels)


def fits(variant, learnt_from, release):
    """Whether a student learnt from the FaceSet `release`; of an own release it must have."""
    if learnt_from == release.digest(np.arange(len(release))):
        return True
    if not variant.cfg.release:
        raise InputError(f'{variant.student} was trained on another release: delete it and run '
                         f'`{run.command("train_fr.py")}`')
    say_no_student(variant)
    return False


def say_no_student(variant):
    """Say what is missing where a foreign release has no recogniser."""
    run.say(f'no recogniser of {variant.cfg.release} in {variant.student}: no utility and no '
            f'insider (first run `{run.command("train_fr.py")}` with another run.folder)')


def leakage(variant, folds, release, student, path, recognisers, device):
    """The attacks on one release and its image quality, or those of an earlier run of the same.

    Returns {'attacked': digest, 'privacy': figures by attack, 'reconstruction': quality}.
    """
    cfg, digest = variant.cfg, None
    if cfg.release:
        groups = foreign_groups(cfg, release, device)
    else:
        maes = protect.load_maes(variant, folds, device)
        secret = keys.release_secret(cfg)
        made_from = protect.release_made_from(cfg, folds, maes, secret)
        protect.check_release(variant, made_from)
        before = {}
        digest = run.on_rank_0(lambda: attack_digest(variant, folds, made_from, device))
        with contextlib.suppress(InputError):              # missing or damaged: made again
            before = files.read_json(path)
        if run.broadcast(before.get('attacked') == digest):
            run.say(f'the attacks of {path} are kept')
            return {key: before[key] for key in ('attacked', 'privacy', 'reconstruction')}
        plan = protect.plan_release(folds, secret, cfg)
        check_release_images(variant.release, plan, folds[0].private,
                             [protect.Protection(cfg, mae) for mae in maes], device)
        groups = own_groups(cfg, folds, maes, release, plan, device)
    batches.decode_once(rows for group in groups for rows in group.read_often())
    results = attack_all(variant, groups, student, recognisers, device)
    released = np.concatenate([g.released.pixels() for g in groups])
    originals = np.concatenate([g.sources().pixels() for g in groups])
    run.on_rank_0(lambda: save_surest_links(picture_prefix(variant), results, released, originals))
    return {'attacked': digest,
            'privacy': {f'{name}_{question}': figures for name, result in results.items()
                        for question, figures in result.figures.items()},
            'reconstruction': psnr_and_ssim(released, originals, device)}


def save_surest_links(prefix, results, released, originals):
    """Picture of what the strongest attacker who compares images by cosines is surest of.

    results: {attack: AttackResult}; released, originals: uint8 (n, H, W, 3).
    """
    rank1 = {name: result.figures['same_image']['rank1'] for name, result in results.items()
             if result.cosines is not None}
    if rank1:
        name = max(rank1, key=rank1.get)
        plots.save_most_linked(f'{name}, {results[name].way}', rank1[name], results[name].cosines,
                               released, originals, f'{prefix}most_linked.png')


def picture_prefix(variant):
    """How the names of a row's pictures begin: folder and row, others' work apart."""
    external = variant.cfg.evaluate.model or variant.cfg.release
    name = 'external' if external else (variant.label or 'release').replace('/', '_')
    return variant.run / 'figures' / f'{name}_'


def attack_all(variant, groups, student, recognisers, device):
    """All attacks of evaluate.attacks on AttackGroups: {name: attacks.AttackResult}."""
    cfg, results = variant.cfg, {}
    names = attacks.short_names(cfg.evaluate.attacks)
    owners = []
    for number in range(len(groups)):
        # One a group, dropped with the row: each keeps the embeddings of its originals, 1 GB of
        # CASIA
        insider = embed.Embedder('insider', student, cfg, device) if student else None
        owners.append(Owned(recognisers, number, cfg, insider, variant.student))
    log = StageLog(cfg.run.folder, f'evaluate/{variant.label}'.rstrip('/'), len(names))
    for number, (entry, name) in enumerate(names.items()):
        log.announce(f'attack {name}')
        if result := attacks.attack(entry, groups, owners, cfg):
            results[name] = result
            log(number + 1, (number + 1) * sum(len(g.source) for g in groups), attack=name)
    return results


def attack_digest(variant, folds, made_from, device):
    """What the attacks on a row depend on, 64 hex digits: equal ones mean equal results."""
    cfg = variant.cfg
    data = [f.public.digest(f.train) for f in folds]
    nets = [cfg.judge.checkpoint, cfg.teacher.checkpoint, *cfg.evaluate.attacks, variant.student,
            *(variant.run / f'fold{f.k}' / f'{role}.pt' for f in folds
              for role in ('judge', 'teacher'))]
    nets = [digest_of_net(path, path.stat().st_mtime_ns) for path in map(Path, nets)
            if path.is_file()]
    config = {k: v for k, v in as_dict(cfg).items() if 'compare' not in k}
    machine = {k: v for k, v in run.provenance(device).items() if k != 'commit'}
    machine |= versions(cfg)
    return files.digest(repr([config, attacks.code_digest(), machine, made_from, data,
                              nets]).encode())


@functools.cache
def digest_of_net(path, changed):
    """SHA-256 of the weights in a checkpoint that was last changed at `changed`, ns: once in a
    run, and without the state of its optimizer."""
    if is_published(path):
        return [files.digest(path.read_bytes())]
    saved = files.load_checkpoint(path)
    return [files.digest_of_weights(embed.tensors(state)) for state in (
        embed.unwrapped(saved), files.entry(saved, 'head'))]


# ---------------------------------------------------------------------------- a comparison

def floors(cfg, folds, sets, device):
    """What is reached without learning anything, as rows of a comparison."""
    private = folds[0].private
    used = np.flatnonzero(not_excluded(private, cfg))
    some = private.select(used[::len(used) // 5000 + 1]).pixels()
    return {'untrained net': verification.untrained_floor(cfg, sets, device),
            'pixel components': verification.component_floor(some, sets)}


def ready_variants(cfg, compare):
    """The Variants whose student is there, or all if none is; names those that are to come."""
    every = variants(cfg, compare)
    exist = run.on_rank_0(lambda: [v.student.exists() for v in every])
    ready = [v for v, exists in zip(every, exist) if exists] or every
    if later := [f'{v.name} (seed {v.seed})' for v in every if v not in ready]:
        run.say(f'without a student yet, left out: {", ".join(later)}')
    return ready


def leads(scores, method):
    """By how much `method` is ahead of every other row: {row: {set: paired_difference()}};
    scores = {row: {seed: {set: PairScores}}}."""
    ahead, own = {}, scores.get(method, {})
    for row, seeds in scores.items():
        for name in next(iter(seeds.values()), {}) if row != method else ():
            ours, theirs = ({seed: sets[name].distance for seed, sets in some.items()
                             if name in sets} for some in (own, seeds))
            same = next(iter(seeds.values()))[name].same
            if gain := verification.paired_difference(ours, theirs, same):
                ahead.setdefault(row, {})[name] = gain
    return ahead


def write_comparison(cfg, results, scores):
    """results.json, table.txt, report.html and plots of all rows, by rank 0 alone; returns the
    Sheets.

    results = {row: [results of each seed]}, scores as for leads().
    """
    folder, method = Path(cfg.run.folder), cfg.reconstruct.method
    ahead = leads(scores, method)
    own = next((r for r in results.get(method, []) if r['seed'] == cfg.run.seed), {})
    released = {name: r for name, r in results.items() if 'privacy' in r[0]}
    with files.only_writer(folder / 'results.json'):
        save_roc(f'{folder}/figures/', scores)
        files.write_json(folder / 'results.json', {'rows': results, 'ahead': ahead, **own})
        sheets = report.tables(results, ahead, method, cfg.reference)
        with files.replacing(folder / 'table.txt') as file:
            text = io.StringIO()
            for sheet in sheets:
                sheet.print(Console(file=text, width=80))
            file.write(text.getvalue().encode())
        plots.tradeoff_plot(released, folder / 'figures')
        write_page(folder, sheets, own)
    return sheets


def say_where(cfg, compare):
    """Where tables, pictures and the release are."""
    folder, names = Path(cfg.run.folder), ('table.txt', 'results.json')[not compare:]
    run.say(f'tables    {", ".join(str(folder / name) for name in names)}')
    run.say(f'pictures  {folder / "figures"}')
    run.say(f'release   {folder / "reconstructed"}')
    if compare:
        run.say(f'all of it on one page: open {folder / "report.html"}')


def main(cfg, device, compare):
    attacks.check_attacks(cfg)
    versions(cfg)                            # refuses early what needs a missing package
    external = cfg.evaluate.model or cfg.release
    if external and compare:
        raise InputError('evaluate.model and release take the place of the rows: leave out '
                         '--compare')
    size = cfg.data.size
    if cfg.evaluate.model:                   # a foreign recogniser sees the pairs at its own size
        size = foreign_recogniser(cfg, device).size
    sets = verification.load_pair_sets(cfg, size)
    folds = [] if external else split(cfg)
    if len(folds) == 1 and len(folds[0].validation):
        sets.append(verification.held_back(folds[0]))
    recognisers = Recognisers(cfg, folds, device)
    results = floors(cfg, folds, sets, device) if compare and sets and folds else {}
    scores = {}
    ready = ready_variants(cfg, compare)
    for variant in ready:
        row_results, row_scores = evaluate(variant, folds, sets, recognisers, device)
        name = Path(external).name if external else variant.name
        results.setdefault(name, []).append(row_results)
        scores.setdefault(name, {})[variant.seed] = row_scores
    run.on_rank_0(lambda: show(cfg, compare, ready[0], results, scores))


def show(cfg, compare, variant, results, scores):
    """Tables and pictures of what was evaluated, by rank 0 alone; arguments as of
    write_comparison()."""
    if compare:
        sheets = write_comparison(cfg, results, scores)
    else:
        sheets = report.tables(results, {}, '', cfg.reference)
        with files.only_writer(path_of_results(variant)):
            save_roc(picture_prefix(variant), scores)
    for sheet in sheets:
        sheet.print(Console())
    say_where(cfg, compare)


def save_roc(prefix, scores):
    """ROC and score histograms of all rows on the first set that was tested: see
    plots.verification_plots(); scores as for leads()."""
    first = {row: next(iter(seeds.values())) for row, seeds in scores.items()}
    tested = next((name for row_scores in first.values() for name in row_scores), None)
    if tested:
        plots.verification_plots({row: row_scores[tested] for row, row_scores in first.items()
                                  if tested in row_scores}, prefix)


if __name__ == '__main__':
    run.launch(main, check_experiment)

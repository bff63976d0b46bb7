# SPDX-License-Identifier: MIT
"""Stage 4 of FaceMAE: what a release is worth, and what it gives away.

    python evaluate.py                                   # the student of the toy run
    python evaluate.py --config configs/casia.yaml
    python evaluate.py --compare                         # all rows, one table
    python evaluate.py evaluate.model=backbone.pth "evaluate.sets=[lfw.bin]"   # any recogniser
    python evaluate.py release=PATH originals=PATH       # anybody's release, same order

Reads   evaluate.sets (.bin), <run>/<row>/fr.pt, <run>/<row>/reconstructed, <run>/fold<k>/judge.pt
Writes  <run>/<row>/results.json (external.json for others' models and releases),
        with --compare all rows in <run>/results.json, table.txt and report.html (one page),
        and <run>/figures/*.png

Utility is insightface's ten-fold verification. Leakage is retrieval: how often the original of a
released image (same image), or another photo of its person (same person), comes first among all
private originals, for the attackers of evaluate.attacks; the table says what each of them has.
"""
import facekit  # noqa: F401 (first: says what is not installed)

import contextlib
import functools
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from rich.console import Console

from facekit import attacks, embed, faces, files, plots, protect, report, retrieval, run
from facekit import verification
from facekit.attack_data import foreign_groups, own_groups
from facekit.check import check_experiment
from facekit.config import as_dict, variants
from facekit.errors import InputError
from facekit.images import psnr_and_ssim
from facekit.page import write_page
from facekit.progress import StageLog, stage_seconds
from facekit.split import count_release, not_excluded, split


# ------------------------------------------------------------------------------ one release

def evaluate(variant, folds, sets, owned, device):
    """Everything about one row, written to its results; returns them and its PairScores by set.

    sets: PairSets; owned: attacks.Owned. Others' work does not overwrite the run's own.
    """
    cfg = variant.cfg
    external = cfg.evaluate.model or cfg.release
    path = variant.folder / 'external.json' if external else variant.results
    with files.only_writer(path):
        saved = load_student(variant)
        release = faces.load_release(variant) if cfg.release or folds else None
        student = None
        if saved and learnt_from(saved, release, variant):
            student = embed.recogniser_from(saved, student_path(variant), device)
        results, scores = {'row': variant.name, 'seed': variant.seed, 'verification': {}}, {}
        if student:
            results['verification'], scores = verification.verify(student, sets, cfg, device)
        if release:
            results |= leakage(variant, folds, release, student, path, owned, device)
        if folds:
            results |= {'people': asdict(count_release(folds, cfg)), 'left_out': {
                str(s.path): s.left_out() for s in (folds[0].private, folds[0].public)}}
        results |= {'seconds': stage_seconds(variant.run), 'made_with': run.provenance(),
                    'config': as_dict(cfg)}
        files.write_json(path, results)
    return results, scores


def student_path(variant):
    """Checkpoint of the recogniser that is evaluated."""
    return Path(variant.cfg.evaluate.model or variant.student)


def load_student(variant):
    """The checkpoint of the recogniser, or None where a foreign release has none of its own."""
    path = student_path(variant)
    if not variant.cfg.release or path.exists():
        return files.load_finished(path, run.command('train_fr.py'))
    say_no_student(variant)
    return None


def learnt_from(saved, release, variant):
    """Whether a recogniser learnt from the FaceSet `release`; one that should have is refused."""
    cfg = variant.cfg
    if not release or cfg.evaluate.model or files.entry(saved, 'premises').get(
            'set of images') == release.digest(np.arange(len(release))):
        return True
    if not cfg.release:
        raise InputError(f'{variant.student} was trained on another release: delete it and run '
                         f'`{run.command("train_fr.py")}`')
    say_no_student(variant)
    return False


def say_no_student(variant):
    """Say what is missing where a foreign release has no recogniser."""
    run.say(f'no recogniser of {variant.cfg.release} in {student_path(variant)}: no utility and '
            f'no insider (first run `{run.command("train_fr.py")}` with another run.folder)')


def leakage(variant, folds, release, student, path, owned, device):
    """The attacks on one release and its image quality, or those of an earlier run of the same.

    Returns {'attacked': digest, 'privacy': figures by attack, 'reconstruction': quality}.
    """
    cfg, digest = variant.cfg, None
    if cfg.release:
        groups = foreign_groups(cfg, release, device)
    else:
        maes = protect.load_maes(variant, folds, device)
        premises = protect.release_premises(folds, maes, protect.release_secret(cfg))
        protect.check_release(variant, premises)
        digest = attacked(variant, folds, premises)
        with contextlib.suppress(InputError):              # missing or damaged: made again
            before = files.read_json(path)
            if before.get('attacked') == digest:
                run.say(f'the attacks of {path} are kept')
                return {key: before[key] for key in ('attacked', 'privacy', 'reconstruction')}
        groups = own_groups(variant, folds, maes, release, device)
    figures, cosines = attack_all(variant, groups, student, owned, device)
    released = np.concatenate([g.released.pixels() for g in groups])
    originals = np.concatenate([g.originals.images[g.originals.rows[g.source]] for g in groups])
    if run.rank() == 0 and cosines:
        folder, row = variant.run / 'figures', cfg.run.row or 'release'
        plots.histogram(cosines, folder / f'{row}_attacks.png')
        rank1 = {name: figures[f'{name}_same_image']['rank1'] for name in cosines}
        strongest = max(rank1, key=rank1.get)
        plots.save_most_linked(strongest, rank1[strongest], cosines[strongest][0], released,
                               originals, folder / f'{row}_most_linked.png')
    return {'attacked': digest, 'privacy': figures,
            'reconstruction': psnr_and_ssim(released, originals, device)}


def attack_all(variant, groups, student, owned, device):
    """All attacks of evaluate.attacks on AttackGroups: {attack_kind: figures}, and of those that
    compare cosines {attack: (of true pairs (n,), of others (n,))}."""
    cfg, figures, cosines = variant.cfg, {}, {}
    names = attacks.short_names(cfg.evaluate.attacks)
    log = StageLog(cfg.run.folder, f'evaluate/{variant.label}'.rstrip('/'), len(names))
    for number, (entry, name) in enumerate(names.items()):
        log.announce(f'attack {name}')
        if entry == 'membership' or entry == 'insider' and not student:
            continue
        tried = [attacks.attack(entry, n, group, owned, student, cfg, device)
                 for n, group in enumerate(groups) if len(group.source)]
        tried = [attack for attack in tried if attack]
        if not tried:
            continue
        found = retrieval.figures_of(tried)
        if (pair := retrieval.cosines_of(tried)) is not None:
            cosines[name] = pair
            accepted = retrieval.accepted_share(tried)
            if accepted is not None:
                found['same_image']['tar@far=1e-3'] = accepted
        figures |= {f'{name}_{kind}': values for kind, values in found.items()}
        log(number + 1, (number + 1) * sum(len(g.source) for g in groups), attack=name)
    if 'membership' in names:
        figures |= membership(variant, groups, student, owned, device)
    return figures, cosines


def membership(variant, groups, student, owned, device):
    """Whether who was in the training of the MAE or of the student can be told: {name: figures}."""
    figures, own = {}, not variant.cfg.release
    if variant.cfg.reconstruct.method == 'facemae' and own:
        figures['membership_reconstruction'] = attacks.reconstruction_membership(groups)
    if student and own and len(groups[0].outsiders):
        head = files.load_checkpoint(variant.student)['head']['weight']
        figures['membership_recogniser'] = attacks.recogniser_membership(
            owned.embedder('student', student), F.normalize(head).to(device), groups)
    return figures


def attacked(variant, folds, premises):
    """What the attacks on a row depend on, in 64 hex digits: results that bear them are kept."""
    cfg = variant.cfg
    nets = [cfg.judge.checkpoint, cfg.teacher.checkpoint, *cfg.evaluate.attacks, variant.student,
            *(variant.run / f'fold{f.k}' / f'{role}.pt' for f in folds
              for role in ('judge', 'teacher'))]
    nets = [digest_of_file(path, path.stat().st_mtime_ns) for path in map(Path, nets)
            if path.is_file()]
    config = {k: v for k, v in as_dict(cfg).items() if 'compare' not in k}
    machine = {k: v for k, v in run.provenance().items() if k != 'commit'}
    return files.digest(repr([config, attacks.code_digest(), machine, premises, nets]).encode())


@functools.cache
def digest_of_file(path, changed):
    """SHA-256 of a file that was last changed at `changed`, ns."""
    return files.digest(path.read_bytes())


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
    every = list(variants(cfg, compare))
    ready = [v for v in every if v.student.exists()] or every
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


def write_comparison(cfg, results, scores, method):
    """results.json, table.txt, report.html and plots of all rows; returns the Sheets.

    results = {row: [results of each seed]}, scores as for leads().
    """
    folder, ahead = Path(cfg.run.folder), leads(scores, method)
    sheets = report.tables(results, ahead, method, cfg.reference)
    own = next((r for r in results.get(method, []) if r['seed'] == cfg.run.seed), {})
    released = {name: r for name, r in results.items() if 'privacy' in r[0]}
    with files.only_writer(folder / 'results.json'):
        files.write_json(folder / 'results.json', {'rows': results, 'ahead': ahead, **own})
        with files.replacing(folder / 'table.txt') as file:
            console = Console(width=80, record=True, quiet=True)
            for sheet in sheets:
                sheet.print(console)
            file.write(console.export_text().encode())
        plots.tradeoff_plot(released, folder / 'figures')
        plots.effort_plots(released, folder / 'figures')
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
    attacks.check_names(cfg.evaluate.attacks)
    if cfg.evaluate.model:                   # a published net sees the pairs at its own size
        cfg.data.size = embed.recogniser(cfg.evaluate.model, device).size
    sets = verification.load_pair_sets(cfg)
    folds = [] if cfg.evaluate.model or cfg.release else split(cfg)
    if len(folds) == 1 and len(folds[0].validation):
        sets.append(verification.held_back(folds[0]))
    owned = attacks.Owned(cfg, folds, sets, device)
    results = floors(cfg, folds, sets, device) if compare and sets and folds else {}
    scores = {}
    ready = ready_variants(cfg, compare)
    for variant in ready:
        of_row, of_sets = evaluate(variant, folds, sets, owned, device)
        results.setdefault(variant.name, []).append(of_row)
        scores.setdefault(variant.name, {})[variant.seed] = of_sets
    if run.rank():
        return
    first = {row: next(iter(seeds.values())) for row, seeds in scores.items()}
    name = next((name for of_sets in first.values() for name in of_sets), None)
    if name:
        prefix = '' if compare else f'{ready[0].label or "release"}_'.replace('/', '_')
        prefix = 'external_' if cfg.evaluate.model or cfg.release else prefix
        plots.verification_plots({row: of_sets[name] for row, of_sets in first.items()
                                  if name in of_sets}, Path(cfg.run.folder, 'figures'), prefix)
    sheets = (write_comparison(cfg, results, scores, ready[0].name) if compare
              else report.tables(results, {}, '', cfg.reference))
    for sheet in sheets:
        sheet.print(Console())
    say_where(cfg, compare)


if __name__ == '__main__':
    run.launch(main, check_experiment, __doc__, 'evaluate all rows of compare in one table')

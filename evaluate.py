# SPDX-License-Identifier: MIT
"""Stage 4 of FaceMAE: what a release is worth, and what it gives away.

    python evaluate.py                                   # the student of the toy run
    python evaluate.py --config configs/casia.yaml
    python evaluate.py --compare                         # all rows, one table
    python evaluate.py evaluate.model=backbone.pth "evaluate.sets=[lfw.bin]"   # any recogniser
    python evaluate.py configs/casia.yaml run.folder=runs/theirs release=PATH originals=PATH
                                                         # anybody's release, same order

Reads   evaluate.sets (.bin), <run>/<row>/fr.pt, <run>/<row>/reconstructed, <run>/fold<k>/judge.pt
Writes  <run>/<row>/results.json (external.json for others' models and releases), <run>/figures;
        with --compare that of all rows, and gathered from them <run>/comparison.json, table.txt
        and report.html (one page)

Utility is insightface's ten-fold verification. Leakage is retrieval: how often the original of a
released image (same image), or another photo of its person (same person), comes first among the
private originals of its fold, for the attackers of evaluate.attacks; the table says what each of
them has. What an attacker found is kept as long as it was found from the same.
"""
import facekit.start  # noqa: F401 (first: says what is not installed)

import contextlib
import io
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console

from facekit import attacks, embed, faces, files, keys, plots, protect, report, retrieval, run
from facekit import verification
from facekit.attack_data import foreign_groups, own_groups
from facekit.check import check_experiment, check_release_images
from facekit.config import as_dict, variants
from facekit.errors import InputError
from facekit.faces import ImageRows
from facekit.images import psnr_and_ssim
from facekit.page import write_page
from facekit.progress import StageLog, stage_seconds
from facekit.published import check_installed, versions
from facekit.split import count_release, not_excluded, split

# Keys of the config that decide what an attack finds, beside images, nets and code
ATTACK_KEYS = ('reconstruct', 'mae.patch', 'run.row', 'run.seed', 'run.precision', 'data.size',
               'judge.checkpoint', 'teacher.checkpoint', 'evaluate.attack_steps',
               'evaluate.probes', 'evaluate.gallery', 'evaluate.onnx_pixels')


@dataclass
class Shared:
    """What all rows of a comparison share."""
    folds: list               # Folds; none for others' models and releases
    sets: list                # PairSets
    recognisers: object       # attacks.Recognisers
    device: torch.device


def main(cfg, device, compare):
    attacks.check_attacks(cfg)
    check_installed(cfg)
    if external(cfg) and compare:
        raise InputError('evaluate.model and release take the place of the rows: leave out '
                         '--compare')
    size = cfg.data.size
    if cfg.evaluate.model:                   # a foreign recogniser sees the pairs at its own size
        size = foreign_recogniser(cfg, device).size
    sets = verification.load_pair_sets(cfg, size)
    folds = [] if external(cfg) else split(cfg)
    if len(folds) == 1 and len(folds[0].validation):
        sets.append(verification.held_back(folds[0]))
    shared = Shared(folds, sets, attacks.Recognisers(cfg, folds, device), device)
    ready = ready_variants(cfg, compare)
    scores = [evaluate(variant, shared) for variant in ready]
    if compare:
        run.on_rank_0(lambda: write_comparison(cfg, shared, ready, scores))
    else:
        run.on_rank_0(lambda: show_row(ready[0], scores[0]))


def ready_variants(cfg, compare):
    """The Variants whose student is there, or all if none is; names those that are to come."""
    every = variants(cfg, compare)
    exist = run.on_rank_0(lambda: [v.student.exists() for v in every])
    ready = [v for v, exists in zip(every, exist) if exists] or every
    if later := [f'{v.name} (seed {v.seed})' for v in every if v not in ready]:
        run.say(f'without a student yet, left out: {", ".join(later)}')
    return ready


# ----------------------------------------------------------------------------------- one row

def evaluate(variant, shared):
    """Everything about one row, written to its results.json; returns its {set: PairScores}."""
    cfg, path, scores = variant.cfg, path_of_results(variant), {}
    with files.only_writer(path):
        release = faces.load_release(variant) if cfg.release or shared.folds else None
        student = load_student(variant, release, shared.device)
        results = {'row': variant.name, 'seed': variant.seed, 'verification': {},
                   'made_with': run.provenance(shared.device), 'config': files.public_dict(cfg)}
        if shared.folds:
            first = shared.folds[0]
            results['people'] = asdict(count_release(shared.folds, cfg))
            results['left_out'] = {'private': first.private.left_out(),
                                   'public': first.public.left_out()}
        if student:
            results['verification'], scores = verification.verify(student, shared.sets, cfg,
                                                                  shared.device)
        if release:
            attack_release(variant, shared, release, student, results)
        results['seconds'] = stage_seconds(variant.run)
        files.write_json(path, results)
    return scores


def external(cfg):
    """Path of somebody else's model or release, whose results have a file of their own, or ''."""
    return cfg.evaluate.model or cfg.release


def path_of_results(variant):
    """Where the figures of a row go."""
    return variant.folder / 'external.json' if external(variant.cfg) else variant.results


def picture(variant, name):
    """Path of a picture of a row."""
    row = 'external' if external(variant.cfg) else (variant.label or 'release').replace('/', '_')
    return variant.run / 'figures' / f'{row}_{name}.png'


def foreign_recogniser(cfg, device):
    """The recogniser of evaluate.model."""
    return embed.recogniser(cfg.evaluate.model, device, onnx_pixels=cfg.evaluate.onnx_pixels)


def load_student(variant, release, device):
    """The recogniser that is evaluated: that of evaluate.model, or one that learnt from the
    FaceSet `release`. None where nobody has trained one on a release made elsewhere."""
    cfg, path, made_by = variant.cfg, variant.student, run.command('train_fr.py')
    if cfg.evaluate.model:
        return foreign_recogniser(cfg, device)
    if not cfg.release or run.on_rank_0(path.exists):
        saved = files.load_finished(path, made_by)
        learnt_from = files.entry(saved, 'premises').get('set of images')
        if learnt_from == release.digest(slice(None)):
            return embed.recogniser_from(saved, path, device)
        if not cfg.release:
            raise InputError(f'{path} was trained on another release: delete it and run '
                             f'`{made_by}`')
    run.say(f'no recogniser of {cfg.release} in {path}: no utility and no insider (first run '
            f'`{made_by}` with another run.folder)')
    return None


def attack_release(variant, shared, release, student, results):
    """The attacks of evaluate.attacks on a release, and its image quality, into `results`, which
    keep what results.json has of the same."""
    cfg, folds, device = variant.cfg, shared.folds, shared.device
    names = attacks.short_names(cfg.evaluate.attacks)
    results |= {'attacked': {}, 'privacy': {}}
    made_from = ''                                  # of others' releases nothing is kept
    if not cfg.release:
        maes, secret = protect.load_maes(variant, folds, device), keys.release_secret(cfg)
        premises = protect.release_premises(folds, maes, secret)
        protect.check_release(variant, premises)
        made_from = run.on_rank_0(lambda: digest_of_attacks(variant, shared, release, premises))
        results |= run.on_rank_0(lambda: kept_attacks(variant.results, made_from))
    missing = [entry for entry, name in names.items()
               if results['attacked'].get(name, {}).get('entry') != entry]
    if not missing and 'reconstruction' in results:
        return
    if cfg.release:
        groups = foreign_groups(cfg, release, device)
    else:
        plan = protect.plan_release(folds, secret, cfg)
        check_release_images(variant.release, plan, folds[0].private,
                             [protect.Protection(cfg, mae) for mae in maes], device)
        groups = own_groups(cfg, folds, maes, release, plan, device)
    attack_all(variant, shared, groups, student, names, missing, made_from, results)


def attack_all(variant, shared, groups, student, names, missing, made_from, results):
    """What attack_release() does, on AttackGroups; names: {entry of evaluate.attacks: its name},
    of which `missing` are tried. Each is written when it is done: no later fault costs it."""
    cfg, device, path = variant.cfg, shared.device, path_of_results(variant)
    released = ImageRows(groups[0].released.images,
                         np.concatenate([group.released.rows for group in groups]))
    originals = ImageRows(groups[0].originals.images,
                          np.concatenate([group.sources().rows for group in groups]))
    results['reconstruction'] = psnr_and_ssim(released.pixels(), originals.pixels(), device)
    # One a group, dropped with the row: each keeps the embeddings of its originals, 1 GB of CASIA
    insiders = [embed.Embedder('insider', student, cfg, device) if student else None
                for _ in groups]
    kept = len(names) - len(missing)
    log = StageLog(cfg.run.folder, f'evaluate/{variant.label}'.rstrip('/'), len(names), kept)
    for number, entry in enumerate(missing, 1):
        name = names[entry]
        log.announce(f'attack {name}')
        tried = tried_by(entry, groups, shared.recognisers, insiders, cfg, device)
        figures = retrieval.figures_of(tried) if tried else {}
        results['privacy'] |= {f'{name}_{question}': values
                               for question, values in figures.items()}
        record = {'entry': entry, 'made_from': digest_of_attack(made_from, entry)}
        if entry == 'membership':
            results['privacy'] |= membership(variant, groups, student, device)
        if entry == 'masked':
            results['privacy'] |= guesses(figures)
            results['attacked']['guess'] = record
        files.write_json(path, results)
        pairs = retrieval.cosines_of(tried) if 'same_image' in figures else None
        if pairs:
            record['linked'] = figures['same_image']['rank1']
            before = max((r.get('linked', -1) for r in results['attacked'].values()), default=-1)
            if record['linked'] > before:
                plots.attempt(plots.save_most_linked, name, pairs.true, released, originals,
                              picture(variant, 'most_linked'))
        results['attacked'][name] = record          # now that its picture is there, too
        files.write_json(path, results)
        log(kept + number, number * len(released), attack=name)


def tried_by(entry, groups, recognisers, insiders, cfg, device):
    """The Attacks of an entry of evaluate.attacks on AttackGroups, without those that make no
    sense."""
    if entry == 'membership' or entry == 'insider' and not insiders[0]:
        return []
    tried = [attacks.attack(entry, n, group, recognisers, insiders[n], cfg, device)
             for n, group in enumerate(groups) if len(group.source)]
    return [attack for attack in tried if attack]


def guesses(figures):
    """Figures of who guesses the masks, from those of who knows them."""
    found = {}
    for question, values in figures.items():
        guessed = values.get('curve', {}).get('mask', {}).values()
        if guessed:
            found[f'guess_{question}'] = {'rank1': max(guessed), 'chance': values['chance']}
    return found


def membership(variant, groups, student, device):
    """Whether one can tell who was in the training of the student: {name: figures}."""
    if not student or variant.cfg.release or not len(groups[0].outsiders):
        return {}
    head = files.load_checkpoint(variant.student)['head']['weight']
    return {'membership_recogniser': attacks.recogniser_membership(
        embed.Embedder('student', student, variant.cfg, device), F.normalize(head).to(device),
        groups)}


def show_row(variant, scores):
    """Tables and ROC of one row, by rank 0 alone; scores: {set: PairScores}."""
    path, cfg = path_of_results(variant), variant.cfg
    with files.only_writer(path):
        name = Path(external(cfg)).name or variant.name
        row = report.Row(name, [files.read_json(path)], {variant.seed: scores})
        plots.attempt(plots.save_roc, [row], picture(variant, 'roc'))
    for sheet in report.tables([row], {}, '', cfg.reference):
        sheet.print(Console())
    run.say(f'results   {path}')
    for drawn in (picture(variant, name) for name in ('roc', 'most_linked')):
        if drawn.exists():
            run.say(f'picture   {drawn}')
    if path == variant.results:
        run.say(f'release   {variant.release}')


# ------------------------------------------------------------------- what is kept of attacks

def kept_attacks(path, made_from):
    """Of results.json the attacks that would find the same again, and the image quality; see
    digest_of_attacks()."""
    with contextlib.suppress(InputError, AttributeError, KeyError, TypeError):    # or damaged
        before = files.read_json(path)
        attacked = {name: record for name, record in before['attacked'].items()
                    if record['made_from'] == digest_of_attack(made_from, record['entry'])}
        if attacked:
            run.say(f'{path}: the attacks {", ".join(attacked)} are kept')
            return {'attacked': attacked, 'reconstruction': before['reconstruction'],
                    'privacy': {key: figures for key, figures in before['privacy'].items()
                                if key.rsplit('_', 2)[0] in attacked}}
    return {}


def digest_of_attack(made_from, entry):
    """What an entry of evaluate.attacks depends on, 64 hex digits: that of the row, and the
    recogniser that it may name."""
    return files.digest(repr([made_from, embed.digest_of(entry), versions([entry])]).encode())


def digest_of_attacks(variant, shared, release, premises):
    """What all attacks on a row depend on, 64 hex digits: equal ones mean equal results."""
    cfg, private = variant.cfg, shared.folds[0].private
    images = [f.public.digest(rows) for f in shared.folds for rows in (f.train, f.mae)]
    images += [private.digest(not_excluded(private, cfg)), release.digest(slice(None))]
    nets = [cfg.judge.checkpoint, cfg.teacher.checkpoint, variant.student]
    nets += [variant.run / f'fold{f.k}' / f'{role}.pt' for f in shared.folds
             for role in ('judge', 'teacher')]
    machine = run.provenance(shared.device)
    return files.digest(repr([
        files.settings(as_dict(cfg), ATTACK_KEYS), attacks.code_digest(), premises, images,
        [embed.digest_of(path) for path in nets], versions([cfg.judge.checkpoint]),
        [machine[what] for what in ('device', 'torch', 'numpy')]]).encode())


# ------------------------------------------------------------------------------ a comparison

def write_comparison(cfg, shared, ready, scores):
    """comparison.json, table.txt, report.html and pictures, gathered from the rows' results.json,
    by rank 0 alone.

    ready: Variants; scores: {set: PairScores} of each.
    """
    folder, method, rows = Path(cfg.run.folder), cfg.reconstruct.method, {}
    path, figures = folder / 'comparison.json', folder / 'figures'
    with files.only_writer(path):
        for variant, row_scores in zip(ready, scores):
            row = rows.setdefault(variant.name, report.Row(variant.name))
            row.results.append(files.read_json(variant.results))
            row.scores[variant.seed] = row_scores
        own, rows = rows.get(method), [*floors(cfg, shared), *rows.values()]
        ahead = report.leads(rows, method)
        files.write_json(path, {'rows': {row.name: row.results for row in rows}, 'ahead': ahead})
        sheets = report.tables(rows, ahead, method, cfg.reference)
        with files.replacing(folder / 'table.txt') as file:
            text = io.StringIO()
            for sheet in sheets:
                sheet.print(Console(file=text, width=80))
            file.write(text.getvalue().encode())
        plots.attempt(plots.save_roc, rows, figures / 'roc.png')
        plots.attempt(plots.save_tradeoff, rows, figures / 'tradeoff.png')
        write_page(folder, sheets, own.results[0] if own else {})
    for sheet in sheets:
        sheet.print(Console())
    run.say(f'tables    {folder / "table.txt"}, {path}')
    run.say(f'pictures  {figures}')
    run.say(f'releases  {", ".join(str(variant.release) for variant in ready)}')
    run.say(f'all of it on one page: open {folder / "report.html"}')


def floors(cfg, shared):
    """What is reached without learning anything, as Rows."""
    private = shared.folds[0].private
    used = np.flatnonzero(not_excluded(private, cfg))
    some = private.select(used[::len(used) // 5000 + 1]).pixels()
    figures = verification.component_floor(some, shared.sets, cfg.evaluate.centred)
    return [report.Row('pixel components', [{'verification': figures}])] if figures else []


if __name__ == '__main__':
    run.launch(main, check_experiment)

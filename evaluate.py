# SPDX-License-Identifier: MIT
"""Stage 4 of FaceMAE: what a release is worth, and what it gives away.

    python evaluate.py                                   # the student of the toy run
    python evaluate.py --compare                         # all rows, one table
    python evaluate.py --compare --check                 # only whether all stages can run
    python evaluate.py evaluate.model=backbone.pth "evaluate.sets=[lfw.bin]"   # any recogniser
    python evaluate.py configs/casia.yaml run.folder=runs/theirs release=PATH originals=PATH
                                                         # anybody's release, same names
    python evaluate.py ... originals=PATH evaluate.partners=false      # that of a synthetic set

Reads   evaluate.sets (.bin), <run>/<row>/fr.pt, <run>/<row>/reconstructed, <run>/fold<k>/judge.pt
Writes  <run>/<row>/results.json (external.json for others' models and releases), <run>/figures;
        measured.json (its figures alone, to publish), scores/*.csv (distances of pairs, cosines
        of attacks); with --compare that of all rows, and gathered from them <run>/comparison.json,
        table.txt, tables.csv and report.html (one page)

Utility is insightface's ten-fold verification. Leakage is retrieval: how often the original of a
released image (same image), or another photo of its person (same person), comes first among the
private originals of its fold, for the attackers of evaluate.attacks; the table says what each of
them has. What an attacker found is kept as long as it was found from the same.
"""
import facekit.base.start  # noqa: F401 (first: says what is not installed)

import contextlib
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from facekit.base import files, process
from facekit.base.errors import InputError
from facekit.base.config import variants
from facekit.base.made_from import public_dict
from facekit.base.launch import command, launch, provenance
from facekit.base.log import StageLog, stage_seconds
from facekit.data import faces
from facekit.data.images import psnr_and_ssim
from facekit.data.pairs import held_back, load_pair_sets
from facekit.data.faces import ImageRows
from facekit.data.people import count_release, not_excluded, split
from facekit.nets import embed
from facekit.nets.published import check_installed
from facekit.nets.weights import load_finished, recogniser, recogniser_from
from facekit.measure import verification
from facekit.privacy import attacks
from facekit.privacy.leak import find_leak
from facekit.privacy.release import planned_release
from facekit.privacy.groups import Owned, foreign_groups, keep_images, own_groups
from facekit.report import exports, pictures
from facekit.report.tables import Row, leads, tables
from facekit.report.page import write_page
from facekit.check import check_experiment


@dataclass
class Shared:
    """What all rows of a comparison share."""
    sets: list                               # PairSets
    folds: list                              # Folds; none of others' models and releases
    device: torch.device
    model: torch.nn.Module | None = None     # the recogniser of evaluate.model
    embedders: dict = field(default_factory=dict)     # see Owned.cache


def main(cfg, device, compare):
    attacks.check_attacks(cfg)
    check_installed(cfg)
    if external(cfg) and compare:
        raise InputError('evaluate.model and release take the place of rows: leave out --compare')
    model, size, folds = None, cfg.data.size, []
    if cfg.evaluate.model:                   # a foreign recogniser sees the pairs at its own size
        model = recogniser(cfg.evaluate.model, device, onnx_pixels=cfg.evaluate.onnx_pixels)
        size = model.size
    sets = load_pair_sets(cfg, size)
    if not external(cfg):
        folds = split(cfg)
    if len(folds) == 1 and len(folds[0].validation):
        sets.append(held_back(folds[0]))
    shared = Shared(sets, folds, device, model)
    ready = ready_variants(cfg, compare)
    scores = [evaluate(variant, shared) for variant in ready]
    process.on_rank_0(lambda: report(cfg, shared, ready, scores, compare))


def ready_variants(cfg, compare):
    """The Variants whose student is there, or all if none is; names those that are to come."""
    every = variants(cfg, compare)
    exist = process.on_rank_0(lambda: [v.student.exists() for v in every])
    ready = [v for v, exists in zip(every, exist) if exists] or every
    if later := [f'{v.name} (seed {v.seed})' for v in every if v not in ready]:
        process.say(f'without a student yet, left out: {", ".join(later)}')
    return ready


def external(cfg):
    """Path of somebody else's model or release, whose results have files of their own, or ''."""
    return cfg.evaluate.model or cfg.release


def path_of(variant, name):
    """Path of a result of a row; for others' models and releases it begins with external."""
    if external(variant.cfg):
        name = {'results.json': 'external.json'}.get(name, f'external_{name}')
    return variant.folder / name


def picture(variant, name):
    """Path of a picture of a row."""
    row = 'external' if external(variant.cfg) else (variant.label or 'release').replace('/', '_')
    return variant.run / 'figures' / f'{row}_{name}.png'


# ----------------------------------------------------------------------------------- one row

def evaluate(variant, shared):
    """Everything about one row, written to its results.json; returns its {set: PairScores}."""
    cfg, path, scores = variant.cfg, path_of(variant, 'results.json'), {}
    folds, device = shared.folds, shared.device
    with process.only_writer(path):
        release = faces.load_release(variant) if cfg.release or folds else None
        student = shared.model or load_student(variant, release, device)
        results = {'row': variant.name, 'seed': variant.seed, 'verification': {},
                   'made_with': provenance(device), 'config': public_dict(cfg)}
        if folds:
            results['people'] = asdict(count_release(folds, cfg))
            results['left_out'] = {'private': folds[0].private.left_out(),
                                   'public': folds[0].public.left_out()}
        if student:
            results['verification'], scores = verification.verify(student, shared.sets, cfg,
                                                                  device)
            if cfg.evaluate.embeddings:
                target = path_of(variant, 'embeddings.npz')
                exports.write_embeddings(target, student_embeddings(variant, shared, student,
                                                                    release))
                process.say(f'embeddings of faces, for you alone: {target}')
        if release and not cfg.evaluate.partners:
            results['leak'] = check_leak(variant, shared, release)
        elif release:
            insider = None if shared.model else student        # which learnt from the release
            attack_release(variant, shared, release, insider, results)
        results['seconds'] = stage_seconds(variant.run)
        process.write_json(path, results)
        process.write_json(path_of(variant, 'measured.json'), exports.measured(results))
        for name, pairs in scores.items():
            exports.write_pairs(path_of(variant, 'scores') / f'pairs_{name}.csv', pairs)
    return scores


def student_embeddings(variant, shared, student, release):
    """The student's embeddings of verification images and of released ones, in their order:
    {name: float32 (N, d)}."""
    images = {s.name: ImageRows(s.images, np.arange(len(s.images))) for s in shared.sets}
    if release:
        images['released images'] = release.select(np.arange(len(release)))
    return {name: embed.unit_embeddings(student, rows, variant.cfg, shared.device)
            .cpu().numpy() for name, rows in images.items()}


def load_student(variant, release, device):
    """The recogniser that learnt from the FaceSet `release`, or None where nobody has trained one
    on a release made elsewhere."""
    cfg, path, made_by = variant.cfg, variant.student, command('train_fr.py')
    if not cfg.release or process.on_rank_0(path.exists):
        saved = load_finished(path, made_by)
        learnt_from = files.entry(saved, 'made_from').get('set of images')
        if learnt_from == release.digest(slice(None)):
            return recogniser_from(saved, path, device)
        if not cfg.release:
            raise InputError(f'{path} was trained on another release: delete it and run '
                             f'`{made_by}`')
    process.say(f'no recogniser of {cfg.release} in {path}: no utility and no insider (first run '
                f'`{made_by}` with another run.folder)')
    return None


def attack_release(variant, shared, release, student, results):
    """The attacks of evaluate.attacks on a release, and its image quality, into `results`, which
    keep what results.json has of the same."""
    cfg, folds, device = variant.cfg, shared.folds, shared.device
    results |= {'attacked': {}, 'privacy': {}}
    if cfg.release:
        made_from = ''                              # of others' releases nothing is kept
    else:
        planned = planned_release(variant, folds, device)
        planned.check_published()
        made_from = process.on_rank_0(lambda: attacks.digest_of_row(planned, folds, release))
        results |= process.on_rank_0(lambda: kept_attacks(variant.results, made_from))
    missing = {entry: name for entry, name in attacks.short_names(cfg.evaluate.attacks).items()
               if results['attacked'].get(name, {}).get('entry') != entry}
    if not missing and 'reconstruction' in results:
        return
    if cfg.release:
        groups = foreign_groups(cfg, release, device)
    else:
        planned.check_images(variant.release)
        groups = own_groups(cfg, folds, planned.protections, release, planned.plan, device)
    attack_all(variant, shared, groups, student, missing, made_from, results)


def attack_all(variant, shared, groups, student, missing, made_from, results):
    """What attack_release() does, on AttackGroups; missing: {entry of evaluate.attacks: its name}.
    Each attack is written when it is done, so that no later fault costs it."""
    cfg, device, path = variant.cfg, shared.device, path_of(variant, 'results.json')
    keep_images(groups)
    released = joined([group.released for group in groups])
    originals = joined([group.sources() for group in groups])
    results['reconstruction'] = psnr_and_ssim(released.pixels(), originals.pixels(), device)
    owners = []
    for number in range(len(groups)):
        # One a group, dropped with the row: each keeps the embeddings of its originals
        insider = embed.Embedder('insider', student, cfg, device) if student else None
        fold = shared.folds[number] if shared.folds else None
        owners.append(Owned(cfg, number, fold, device, shared.embedders, insider,
                            variant.student))
    total = len(set(cfg.evaluate.attacks))
    kept = total - len(missing)
    log = StageLog(cfg.run.folder, f'evaluate/{variant.label}'.rstrip('/'), total, kept)
    for number, (entry, name) in enumerate(missing.items(), 1):
        log.announce(f'attack {name}')
        result = attacks.attack(entry, groups, owners, cfg) or attacks.AttackResult({})
        results['privacy'] |= {f'{name}_{question}': figures
                               for question, figures in result.figures.items()}
        process.write_json(path, results)
        record = {'entry': entry, 'made_from': attacks.digest_of_attack(made_from, entry),
                  'questions': list(result.figures), 'linked': 0.0}
        if result.cosines is not None:
            record['linked'] = result.figures['same_image']['rank1']
            exports.write_csv(
                path_of(variant, 'scores') / f'attack_{name.replace("/", "_")}.csv',
                [['cosine with own original'], *result.cosines[:, None]])
        if record['linked'] > max((r['linked'] for r in results['attacked'].values()), default=0):
            pictures.attempt(pictures.save_most_linked, f'{name}, {result.way}', record['linked'],
                             result.cosines, released, originals, picture(variant, 'most_linked'))
        results['attacked'][name] = record          # now that its picture is there, too
        process.write_json(path, results)
        log(kept + number, number * len(released), attack=name)


def check_leak(variant, shared, release):
    """{embedder: figures} of the originals nearest to a release without partners, and pictures."""
    cfg, found = variant.cfg, {}
    if not (cfg.release and cfg.originals):
        raise InputError('evaluate.partners=false compares two sets: give both paths, release '
                         'and originals')
    originals = faces.load(cfg.originals, cfg)
    owned = Owned(cfg, 0, None, shared.device, shared.embedders)
    for name in ('judge', 'pixels'):
        leak = find_leak(owned.embedder(name), release, originals)
        found[name], surest = leak.figures(), leak.surest()
        process.say(f'{name}: {leak.sentence()}')
        pictures.attempt(pictures.save_pairs, release.select(surest),
                         originals.select(leak.nearest[surest]), f'the surest links of "{name}"',
                         picture(variant, f'leak_{name}'))
    return found


def kept_attacks(path, made_from):
    """Of results.json the attacks that would find the same again, and the image quality; see
    attacks.digest_of_row()."""
    with contextlib.suppress(InputError, AttributeError, KeyError, TypeError):    # or damaged
        before = files.read_json(path)
        attacked = {name: record for name, record in before['attacked'].items()
                    if record['made_from'] == attacks.digest_of_attack(made_from, record['entry'])}
        keys = [f'{name}_{question}' for name, record in attacked.items()
                for question in record['questions']]
        if lost := [name for name in before['attacked'] if name not in attacked]:
            process.say(f'{path}: nets, images, settings or code changed since it was made: left '
                        f'out are the attacks {", ".join(lost)}')
        if attacked:
            process.say(f'{path}: the attacks {", ".join(attacked)} are kept')
            return {'attacked': attacked, 'reconstruction': before['reconstruction'],
                    'privacy': {key: before['privacy'][key] for key in keys}}
    return {}


def joined(parts):
    """ImageRows of one set as one."""
    return ImageRows(parts[0].images, np.concatenate([part.rows for part in parts]))


# ----------------------------------------------------------------------------- what is shown

def report(cfg, shared, ready, scores, compare):
    """Tables and pictures of the Variants `ready`, from their results.json, by rank 0 alone; with
    `compare` in files of the run, too. scores: {set: PairScores} of each."""
    folder, method, rows = Path(cfg.run.folder), cfg.reconstruct.method, {}
    first = path_of(ready[0], 'results.json')
    with process.only_writer(folder / 'comparison.json' if compare else first):
        for variant, row_scores in zip(ready, scores):
            name = Path(external(cfg)).name or variant.name
            row = rows.setdefault(name, Row(name))
            row.results.append(files.read_json(path_of(variant, 'results.json')))
            row.scores[variant.seed] = row_scores
        own, rows = rows.get(method), list(rows.values())
        if compare:
            rows = [*floors(cfg, shared), *rows]
        ahead = leads(rows, method)
        sheets = tables(rows, ahead, method, cfg.reference)
        if compare:
            files.write_json(folder / 'comparison.json',
                             {'rows': {row.name: row.results for row in rows}, 'ahead': ahead})
            write_comparison(folder, rows, sheets, own.results[0] if own else {})
        else:
            pictures.attempt(pictures.save_roc, rows, picture(ready[0], 'roc'))
    for sheet in sheets:
        sheet.print(Console())
    releases = [str(variant.release) for variant in ready
                if not external(cfg) and variant.cfg.reconstruct.method != 'none']
    if releases:
        process.say(f'releases  {", ".join(releases)}')
        process.say('publish   these and measured.json beside them, nothing else')
    if compare:
        process.say(f'tables    {folder}/table.txt, tables.csv, comparison.json')
        process.say(f'pictures  {folder / "figures"}')
        process.say(f'all of it on one page: open {folder / "report.html"}')
    else:
        others = ', '.join(path_of(ready[0], name).name for name in ('measured.json', 'scores'))
        process.say(f'results   {first}, {others}; pictures {picture(ready[0], "*")}')


def write_comparison(folder, rows, sheets, results):
    """table.txt, tables.csv, pictures and the page of a run; results: of a row that says what made
    them."""
    with files.replacing(folder / 'table.txt') as file:
        text = io.StringIO()
        for sheet in sheets:
            sheet.print(Console(file=text, width=80))
        file.write(text.getvalue().encode())
    exports.write_sheets(folder / 'tables.csv', sheets)
    pictures.attempt(pictures.save_roc, rows, folder / 'figures' / 'roc.png')
    pictures.attempt(pictures.save_tradeoff, rows, folder / 'figures' / 'tradeoff.png')
    pictures.attempt(pictures.save_losses, folder / 'log', folder / 'figures' / 'losses.png')
    write_page(folder, sheets, results)


def floors(cfg, shared):
    """What is reached without learning anything, as Rows."""
    private = shared.folds[0].private
    used = np.flatnonzero(not_excluded(private, cfg))
    some = private.select(used[::len(used) // 5000 + 1]).pixels()
    figures = verification.component_floor(some, shared.sets, cfg.evaluate.centred)
    return [Row('pixel components', [{'verification': figures}])] if figures else []


if __name__ == '__main__':
    launch(main, check_experiment)

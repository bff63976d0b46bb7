"""Tables, verdicts and pictures, from results made up so that the right ones are known."""
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from conftest import ROOT, run
from facekit.base import config
from facekit.base.errors import InputError
from facekit.data.pairs import load_pairs
from facekit.measure import retrieval
from facekit.measure.verification import PairScores, fold_accuracies
from facekit.privacy.attacks import STRONGEST
from facekit.report import exports, pictures
from facekit.report.tables import Row, comparable, tables


def result(method, accuracy, person, photo, spread=0, **more):
    """results.json of a row that `pixels` find most of, with intervals of +- spread."""
    attacks = {}
    for name, share in (('judge', 0.5), ('pixels', 1.0)):
        for question, value in (('same_person', share * person), ('same_image', share * photo)):
            attacks[f'{name}_{question}'] = {
                'rank1': value, 'chance': 0.01, 'rank1_ci': [value - spread, value + spread],
                'rank1_of_choosers': value, 'probes': 900, 'people': 90}
    attacks |= more
    return {'verification': {'lfw': {'accuracy': accuracy, 'auc': 0.9, 'tar@far=1e-2': 0.5}},
            'privacy': attacks, 'attacked': {name.rsplit('_', 2)[0]: {} for name in attacks},
            'reconstruction': {'psnr': 20.0, 'ssim': 0.5},
            'config': {'reconstruct': {'method': method, 'mask_ratio': 0.9},
                       'mae': {'patch': 8}, 'data': {'size': 48}, 'release': '',
                       'judge': {'checkpoint': ''}, 'teacher': {'checkpoint': ''}}}


def scores(accuracy, pairs):
    """PairScores of which the ten-fold protocol gets a share right, {set: PairScores}."""
    same = np.arange(pairs) % 2 == 0
    wrong = np.random.default_rng(0).permutation(pairs) < round((1 - accuracy) * pairs)
    return {'lfw': PairScores(np.where(same == wrong, 1.5, 0.5), same)}


def sheet(rows, title, references=None):
    """The table whose title begins so, of Rows, or of {row: [results of each seed]}."""
    if isinstance(rows, dict):
        rows = [Row(name, results) for name, results in rows.items()]
    return next((s for s in tables(rows, {}, 'facemae', references or {})
                 if s.title.startswith(title)), None)


NOBODY = 'no distortion here is worth as much'
AGAINST = '; 900 probes of 90 people, 1 seed'


@pytest.mark.parametrize('changes, error, person, photo', [
    # Half of the error, but nothing else is worth as much
    ({'accuracy': 0.96, 'noise': 0.85},
     ['reached', '4.0 [3, 5] against 10.0 [9, 11] (blur); 4000 pairs, 1 seed'],
     ['cannot be said', NOBODY], ['cannot be said', NOBODY]),
    # Half of it by a hair, which the interval over pairs does not bear
    ({'accuracy': 0.951, 'noise': 0.85, 'pairs': 1000}, ['cannot be said', '4.9 ['], None, None),
    # Compared with noise, not with blur, which leaks less and is worth less
    ({}, ['not reached', '5.1 [4, 6] against 4.0 [3, 5] (noise); '],
     ['reached', '10.0 against 50.0 (noise)' + AGAINST],
     ['reached', '40.0 against 50.0 (noise)' + AGAINST]),
    ({'photo': 0.41}, None, None, ['not reached', '41.0 against 50.0 (noise)' + AGAINST]),
    ({'spread': 0.06}, None,
     ['reached', '10.0 [4, 16] against 50.0 [44, 56] (noise)' + AGAINST],
     ['cannot be said', '40.0 [34, 46] against 50.0 [44, 56] (noise)' + AGAINST]),
    # A fifth less by the middles, between which the intervals leave no room for a fifth
    ({'spread': 0.04, 'photo': 0.39}, None, None, ['cannot be said', '39.0 [35, 43] against']),
    ({'floor': 0.949}, ['cannot be said', 'facemae is worth no more than pixel components'],
     ['cannot be said', 'facemae is worth no more than pixel components'],
     ['cannot be said', 'facemae is worth no more than pixel components'])])
def test_a_claim_gets_a_verdict_where_the_intervals_bear_it(changes, error, person, photo):
    v = {'accuracy': 0.949, 'photo': 0.4, 'noise': 0.96, 'spread': 0, 'floor': 0.6,
         'pairs': 4000} | changes
    rows = [Row('pixel components', [{'verification': {'lfw': {'accuracy': v['floor']}}}])]
    for name, method, accuracy, *leaks in (
            ('facemae', 'facemae', v['accuracy'], 0.1, v['photo'], v['spread']),
            ('blur', 'blur', 0.9, 0.4, 0.4),
            ('noise', 'noise', v['noise'], 0.5, 0.5, v['spread']),
            ('originals', 'none', 0.99, 1, 1)):
        rows.append(Row(name, [result(method, accuracy, *leaks)],
                        {0: scores(accuracy, v['pairs'])}))
    for line, expected in zip(sheet(rows, "the paper's claims").rows, (error, person, photo)):
        assert expected is None or line[1] == expected[0]
        assert expected is None or line[2].startswith(expected[1]), line


def test_a_claim_is_over_seeds_and_needs_common_ones():
    rows = [Row('facemae', [result('facemae', 0.97, share, 0.1) for share in (0.1, 0.5)]),
            Row('noise', [result('noise', 0.97, 0.4, 0.9) for _ in range(2)])]
    error, person, photo = sheet(rows, "the paper's claims").rows
    assert error[1:] == ['cannot be said', 'facemae and noise share no seed']
    # 30 in the mean against 40, but seeds so far apart decide nothing; of photos all agree
    assert person[1] == 'cannot be said' and '2 seeds' in person[2]
    assert photo[1:] == ['reached', '10.0 against 90.0 (noise); 900 probes of 90 people, 2 seeds']
    for row, accuracies in zip(rows, ((0.999, 0.93), (0.9, 0.9))):
        row.scores = {seed: scores(a, 2000) for seed, a in enumerate(accuracies)}
    assert sheet(rows, "the paper's claims").rows[0][1] == 'cannot be said'
    rows[0].scores[1] = scores(0.999, 2000)
    assert sheet(rows, "the paper's claims").rows[0][1] == 'reached'


def test_a_person_with_many_photos_counts_once():
    first, person = torch.tensor([1., 1, 1, 1, 0, 1, 0]), np.array([3, 3, 3, 3, 8, 9, 9])
    ranking = retrieval.Ranking(first, first, torch.arange(7))
    figures = retrieval.summary([ranking], [ranking], person)
    assert figures['rank1'] == pytest.approx(5 / 7) and figures['each_person_once'] == 0.5
    privacy = result('facemae', 0.9, 0.1, 0.3, judge_same_person=figures)
    assert sheet({'facemae': [privacy]}, 'person, with each').rows == [['facemae', '50.0']]


def test_the_headline_is_of_a_fixed_list_that_attacked_every_row():
    figures = {'rank1': 1.0, 'chance': 0.01, 'rank1_ci': [1, 1], 'rank1_of_choosers': 1.0,
               'probes': 9, 'people': 3}
    linear = figures | {'rank1': 0.35, 'rank1_ci': [0.3, 0.4], 'rank1_of_choosers': 0.33}
    more = {f'{name}_same_image': figures for name in ('repeated', 'masked', 'guess', 'backbone')}
    row = Row('facemae', [result('facemae', 0.9, 0.1, 0.3, linear_same_image=linear,
                                 class_label=figures, **more)])
    mask = Row('mask', [result('mask', 0.9, 0.1, 0.3, **more)])
    assert comparable([row]) == ['judge', 'pixels', 'linear']
    assert comparable([row, mask]) == ['judge', 'pixels']
    assert row.strongest('same_image', STRONGEST).rank1 == 0.35
    row.results.append(result('facemae', 0.9, 0.3, 0.35, linear_same_image=linear))
    found = row.strongest('same_image', STRONGEST)          # of two seeds that agree
    assert (found.rank1, found.seeds) == (pytest.approx(0.35), 2)
    person = row.strongest('same_person', STRONGEST)        # that do not: 12.7 standard errors
    assert person.rank1 == pytest.approx(0.2) and (person.low, person.high) == (0, 1)
    assert np.isnan(row.strongest('same_image', ['nobody']).rank1)
    row.results[0]['privacy']['linear_same_image'] = linear | {'rank1_of_choosers': 0.2}
    chosen = row.strongest('same_image', STRONGEST)         # pixels, by those who choose
    assert chosen.rank1 == pytest.approx((0.3 + 0.35) / 2)
    assert sheet([row, mask], "the paper's claims").title.endswith('strongest of judge, pixels')


def test_published_values_stand_below_and_repeated_ones_get_a_verdict():
    rows = {'facemae': [result('facemae', a, 0.1, 0.4) for a in (0.836, 0.844)],
            'mask': [result('mask', 0.80, 0.1, 0.3)]}
    references = {'CASIA': {'source': 'a paper', 'lfw': 99.5},
                  'facemae': {'source': 'ours', 'lfw': [83.0, 0.5], 'photo': [38.0, 0.9]},
                  'mask': {'source': 'ours', 'lfw': [80.5, 0.3], 'agedb': [70.0, 1.0]},
                  'blur': {'source': 'ours', 'lfw': [70.0, 1.0]}}
    assert ['CASIA (published)', '99.5', '', ''] in sheet(rows, 'utility', references).rows
    assert sheet(rows, 'repetition', references).rows == [
        ['facemae', 'lfw', '84.0', '83.0 ±0.5', 'within 2 standard deviations'],
        ['facemae', 'photo', '40.0', '38.0 ±0.9', 'differs'],
        ['mask', 'lfw', '80.0', '80.5 ±0.3', 'within 2 standard deviations']]
    assert sheet(rows, 'repetition', {'CASIA': references['CASIA']}) is None


@pytest.mark.parametrize('values', [{'lfw': '1'}, {'source': 'x', 'lfw': 'high'}, ['1'], '1',
                                    {'source': 'x', 'lfw': ['1']}, {'source': ['x'], 'lfw': '1'}])
def test_references_of_another_form_are_refused(values):
    with pytest.raises(InputError, match='reference.row'):
        config.check_value('reference', {'row': values}, config.SPECS['reference'])


def test_tables_say_how_many_patches_are_visible_and_are_not_broken_at_80_columns():
    rows = {'facemae': [result('facemae', 0.9, 0.1, 0.4)], 'blur': [result('blur', 0.9, 0.1, 0.4)]}
    quality = {row[0]: row[1] for row in sheet(rows, 'image quality').rows}
    assert quality == {'facemae': '4 of 36', 'blur': 'all'}      # 36 - round(32.4)
    rows = [Row(name, [result('facemae', 0.9, 0.1, 0.3)] * 3)
            for name in ('facemae', 'originals', 'a_row_of_a_long_name')]
    text = io.StringIO()
    for s in tables(rows, {}, 'facemae', {}):
        s.print(Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and '…' not in text.getvalue()
    assert sum(line.strip().startswith('a_row_of_a_long_name') for line in lines) >= 4


def test_a_picture_that_fails_is_a_sentence(tmp_path, capsys):
    rows = [Row('facemae', [result('facemae', 0.9, 0.1, 0.3)])]
    for path in (tmp_path / 'a.png', '/dev/null/b.png'):           # which is no folder
        pictures.attempt(pictures.save_tradeoff, rows, path)
    assert (tmp_path / 'a.png').stat().st_size > 1000
    told, = capsys.readouterr().out.splitlines()
    assert 'warning: a picture is missing' in told and '/dev/null/b.png' in told


def test_pictures_need_no_backend_of_matplotlib(tmp_path):
    code = """
import numpy as np
from facekit.measure import verification
from facekit.report import pictures
from facekit.report.tables import Row
scores = verification.PairScores(np.arange(20) / 10, np.arange(20) < 12)
pictures.save_roc([Row('row', scores={0: {'lfw': scores}})], 'roc.png')
"""
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, timeout=100,
                   env=os.environ | {'MPLBACKEND': 'inline', 'PYTHONPATH': str(ROOT)})
    assert (tmp_path / 'roc.png').stat().st_size > 1000


def test_what_may_be_published_names_no_file_secret_or_setting():
    figures = {'rank1': 0.2, 'way': 'embeddings', 'chance': 0.01}
    row = result('facemae', 0.9, 0.1, 0.3, home_ann_net_same_image=figures, class_label=figures,
                 judge_same_image=figures, membership_recogniser={'auc': 0.5})
    row['verification']['lfw']['sha256'] = 'f' * 64
    shown = exports.measured(row)
    assert shown.keys() == {'verification', 'privacy', 'reconstruction'}
    assert shown['verification'] == {'lfw': {'accuracy': 0.9, 'auc': 0.9, 'tar@far=1e-2': 0.5}}
    assert shown['privacy']['judge_same_image'] == {'rank1': 0.2, 'chance': 0.01}
    assert shown['privacy'].keys() == row['privacy'].keys() - {'home_ann_net_same_image'}


def test_scores_tables_and_figures_can_be_taken_away(finished, tmp_path):
    run_folder = shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True) / 'run'
    results = json.loads((run_folder / 'results.json').read_text())
    distance, same = np.loadtxt(run_folder / 'scores/pairs_toy.csv', delimiter=',', skiprows=1).T
    accuracy = fold_accuracies(distance, same == 1).mean()
    assert accuracy == pytest.approx(results['verification']['toy']['accuracy'])
    cosines = np.loadtxt(run_folder / 'originals/scores/attack_judge.csv', skiprows=1)
    assert len(cosines) == 60 and cosines == pytest.approx(1)          # each is its own original
    for row in ('', 'mask', 'originals'):
        results, shown = (json.loads((run_folder / row / name).read_text())
                          for name in ('results.json', 'measured.json'))
        assert shown == exports.measured(results)
    lines = list(csv.reader((run_folder / 'tables.csv').read_text().splitlines()))
    title = lines.index(['image quality (says nothing of identity)'])
    assert lines[title + 2][:2] == ['facemae', '4 of 16'] and lines[title + 5] == []
    said = run(tmp_path, 'evaluate.py', 'evaluate.embeddings=true', 'evaluate.attacks=[judge]')
    assert 'results   run/results.json, measured.json, scores; pictures run/figures/' in said
    path = run_folder / 'embeddings.npz'
    assert path.stat().st_mode & 0o777 == 0o600
    with np.load(path) as arrays:
        assert arrays['embeddings of released images'].shape == (60, 32)
        faces = load_pairs(tmp_path / 'faces' / 'toy.bin', 32)
        z = arrays['embeddings of toy']
    apart = np.square(z[faces.pairs[:, 0]] - z[faces.pairs[:, 1]]).sum(1)
    np.testing.assert_allclose(apart, distance, atol=1e-5)


def test_the_page_begins_with_the_picture_and_the_verdicts_and_says_what_tables_mean(finished):
    page = (finished[0] / 'run' / 'report.html').read_text()
    words = re.sub(r'base64,[^"]*', '', page)
    order = ['class="warning"', 'what is released</h2>', "the paper&#x27;s claims", 'utility:',
             'Privacy against utility', 'Losses in training', 'Settings']
    assert [words.index(x) for x in order] == sorted(words.index(x) for x in order)
    tested = words[words.index('utility:'):words.index('Privacy against')]
    assert tested.count('class="meaning"') == tested.count('<table') > 8
    for word in ('judge: a recogniser that', 'insider: the release', 'Chance:', 'TAR@1%:',
                 'floor:'):
        assert word in words
    for link in re.findall('href="([^"]+)"', words):
        assert (finished[0] / 'run' / link).is_file()
    assert '@media print' in words and 'width=device-width' in words

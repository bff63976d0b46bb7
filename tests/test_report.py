"""Tables, verdicts and pictures, from results made up so that the right ones are known."""
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from conftest import ROOT
from facekit.base import config
from facekit.base.errors import InputError
from facekit.measure import retrieval
from facekit.report import pictures
from facekit.report.tables import Row, comparable, tables


def result(method, accuracy, person, photo, spread=0, **more):
    """results.json of a row that `pixels` find most of, with intervals of +- spread."""
    attacks = {}
    for name, share in (('judge', 0.5), ('pixels', 1.0)):
        for question, value in (('same_person', share * person), ('same_image', share * photo)):
            attacks[f'{name}_{question}'] = {'rank1': value, 'chance': 0.01,
                                             'rank1_ci': [value - spread, value + spread]}
    attacks |= more
    return {'verification': {'lfw': {'accuracy': accuracy, 'auc': 0.9, 'tar@far=1e-2': 0.5}},
            'privacy': attacks, 'attacked': {name.rsplit('_', 2)[0]: {} for name in attacks},
            'reconstruction': {'psnr': 20.0, 'ssim': 0.5},
            'config': {'reconstruct': {'method': method, 'mask_ratio': 0.9},
                       'mae': {'patch': 8}, 'data': {'size': 48}, 'release': '',
                       'judge': {'checkpoint': ''}, 'teacher': {'checkpoint': ''}}}


def sheet(rows, title, references=None):
    """Lines of the table whose title begins so, of {row: [results of each seed]}."""
    rows = [Row(name, results) for name, results in rows.items()]
    found = [s for s in tables(rows, {}, 'facemae', references or {})
             if s.title.startswith(title)]
    return found[0].rows if found else None


NOBODY = 'no distortion here is worth as much'


@pytest.mark.parametrize('changes, error, person, photo', [
    # Half of the error, but nothing else is worth as much
    ({'accuracy': 0.95, 'noise': 0.85}, ['reached', '5.0 against 10.0 (blur)'],
     ['cannot be said', NOBODY], ['cannot be said', NOBODY]),
    # Compared with noise, not with blur, which leaks less and is worth less
    ({}, ['not reached', '5.1 against 4.0 (noise)'], ['reached', '10.0 against 50.0 (noise)'],
     ['reached', '40.0 against 50.0 (noise)']),
    ({'photo': 0.41}, None, None, ['not reached', '41.0 against 50.0 (noise)']),
    ({'spread': 0.06}, None, ['reached', '10.0 [4, 16] against 50.0 [44, 56] (noise)'],
     ['cannot be said', '40.0 [34, 46] against 50.0 [44, 56] (noise): intervals overlap']),
    ({'floor': 0.949}, ['not reached', '5.1 against 4.0 (noise)'],
     ['cannot be said', 'facemae is worth no more than pixel components'], None)])
def test_claims_are_reached_at_half_the_error_and_a_fifth_less_leakage(changes, error, person,
                                                                       photo):
    v = {'accuracy': 0.949, 'photo': 0.4, 'noise': 0.96, 'spread': 0, 'floor': 0.6} | changes
    rows = {'pixel components': [{'verification': {'lfw': {'accuracy': v['floor']}}}],
            'facemae': [result('facemae', v['accuracy'], 0.1, v['photo'], v['spread'])],
            'blur': [result('blur', 0.90, 0.4, 0.40)],
            'noise': [result('noise', v['noise'], 0.5, 0.50, v['spread'])],
            'originals': [result('none', 0.99, 1, 1)]}
    for line, expected in zip(sheet(rows, "the paper's claims"), (error, person, photo)):
        assert expected is None or line[1:] == expected


def test_a_person_with_many_photos_counts_once():
    first, person = torch.tensor([1., 1, 1, 1, 0, 1, 0]), np.array([3, 3, 3, 3, 8, 9, 9])
    ranking = retrieval.Ranking(first, first, torch.arange(7))
    figures = retrieval.summary([ranking], [ranking], person)
    assert figures['rank1'] == pytest.approx(5 / 7) and figures['each_person_once'] == 0.5
    privacy = result('facemae', 0.9, 0.1, 0.3, judge_same_person=figures)
    assert sheet({'facemae': [privacy]}, 'person, with each') == [['facemae', '50.0']]


def test_the_headline_is_of_who_has_the_release_alone_and_attacked_every_row():
    figures = {'rank1': 1.0, 'chance': 0.01}
    guess = {'rank1': 0.35, 'chance': 0.01, 'rank1_ci': [0.3, 0.4]}
    row = Row('facemae', [result('facemae', 0.9, 0.1, 0.3, repeated_same_image=figures,
                                 masked_same_image=figures, class_label=figures,
                                 guess_same_image=guess, backbone_same_person=figures)])
    mask = Row('mask', [result('mask', 0.9, 0.1, 0.3, guess_same_image=guess)])
    assert comparable([row]) == ['judge', 'pixels', 'guess', 'backbone']
    assert comparable([row, mask]) == ['judge', 'pixels', 'guess']
    row.results.append(result('facemae', 0.9, 0.3, 0.25, guess_same_image=figures))
    shared = comparable([row, mask])
    assert row.strongest('same_person', shared)[0] == pytest.approx(0.2)      # of two seeds
    assert row.strongest('same_image', shared) == pytest.approx([0.675, 0.65, 0.7])
    assert np.isnan(row.strongest('same_image', ['nobody'])[0])


def test_published_values_stand_below_and_repeated_ones_get_a_verdict():
    rows = {'facemae': [result('facemae', a, 0.1, 0.4) for a in (0.836, 0.844)],
            'mask': [result('mask', 0.80, 0.1, 0.3)]}
    references = {'CASIA': {'source': 'a paper', 'lfw': 99.5},
                  'facemae': {'source': 'ours', 'lfw': [83.0, 0.5], 'photo': [38.0, 0.9]},
                  'mask': {'source': 'ours', 'lfw': [80.5, 0.3], 'agedb': [70.0, 1.0]},
                  'blur': {'source': 'ours', 'lfw': [70.0, 1.0]}}
    assert ['CASIA (published)', '99.5', '', ''] in sheet(rows, 'utility', references)
    assert sheet(rows, 'repetition', references) == [
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
    quality = {row[0]: row[1] for row in sheet(rows, 'image quality')}
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

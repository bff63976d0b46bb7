"""Tables and verdicts, from results that were made up so that the right words are known."""
import io

import numpy as np
import pytest
import torch
from rich.console import Console

from facekit import config, report, retrieval
from facekit.errors import InputError


def result(method, accuracy, person, photo, **more):
    attacks = {f'{name}_{kind}': {'rank1': value, 'chance': 0.01}
               for name, share in (('judge', 0.5), ('pixels', 1.0))
               for kind, value in (('same_person', share * person), ('same_image', share * photo))}
    return {'verification': {'lfw': {'accuracy': accuracy, 'auc': 0.9, 'tar@far=1e-2': 0.5}},
            'privacy': attacks | more, 'reconstruction': {'psnr': 20.0, 'ssim': 0.5},
            'config': {'reconstruct': {'method': method, 'mask_ratio': 0.9},
                       'mae': {'patch': 8}, 'data': {'size': 48}, 'release': '',
                       'judge': {'checkpoint': ''}, 'teacher': {'checkpoint': ''}}}


def sheet(rows, title, references=None):
    found = [s for s in report.tables(rows, {}, 'facemae', references or {})
             if s.title.startswith(title)]
    return found[0].rows if found else None


def claims(accuracy, photo, noise_accuracy):
    """Verdict and figures of the three claims, where noise has that accuracy and leaks 50 %."""
    rows = {'facemae': [result('facemae', accuracy, 0.1, photo)],
            'blur': [result('blur', 0.90, 0.4, 0.40)],
            'noise': [result('noise', noise_accuracy, 0.5, 0.50)],
            'originals': [result('none', 0.99, 1, 1)]}
    return [row[1:] for row in sheet(rows, "the paper's claims")]


def test_claims_are_reached_at_half_the_error_and_a_fifth_less_leakage():
    error, person, photo = claims(0.95, 0.4, noise_accuracy=0.85)
    assert error == ['reached', '5.0 against 10.0 (blur)']
    assert person[0] == photo[0] == 'cannot be said'            # nothing is worth as much
    error, person, photo = claims(0.949, 0.4, noise_accuracy=0.96)
    assert error == ['not reached', '5.1 against 4.0 (noise)']
    assert person == ['reached', '10.0 against 50.0 (noise)']   # not blur, which is worth less
    assert photo == ['reached', '40.0 against 50.0 (noise)']
    assert claims(0.949, 0.41, noise_accuracy=0.96)[2][0] == 'not reached'


def test_a_person_with_many_photos_counts_once():
    first, person = torch.tensor([1., 1, 1, 1, 0, 1, 0]), np.array([3, 3, 3, 3, 8, 9, 9])
    ranking = retrieval.Ranking(first, first, torch.arange(7))
    figures = retrieval.summary([ranking], [ranking], person)
    assert figures['rank1'] == pytest.approx(5 / 7) and figures['each_person_once'] == 0.5
    privacy = result('facemae', 0.9, 0.1, 0.3, judge_same_person=figures)
    assert sheet({'facemae': [privacy]}, report.EACH_ONCE) == [['facemae', '50.0']]


def test_attackers_who_hold_more_than_the_release_do_not_make_the_headline():
    privacy = result('facemae', 0.9, 0.1, 0.3, **{
        f'{name}_{question}': {'rank1': rank1, 'chance': 0.01} for name, question, rank1 in (
            ('masked', 'same_image', 1.0), ('repeated', 'same_image', 1.0), ('class', 'label', 1.0),
            ('guess', 'same_image', 0.35), ('r50/backbone', 'same_person', 0.2))})['privacy']
    assert report.strongest_attack(privacy, 'same_image') == 0.35    # who guesses the masks
    assert report.strongest_attack(privacy, 'same_person') == 0.2    # a recogniser by its path


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


def test_tables_say_how_many_patches_are_visible():
    rows = {'facemae': [result('facemae', 0.9, 0.1, 0.4)], 'blur': [result('blur', 0.9, 0.1, 0.4)]}
    quality = {row[0]: row[1] for row in sheet(rows, 'image quality')}
    assert quality == {'facemae': '4 of 36', 'blur': 'all'}      # 36 - round(32.4)


def test_tables_are_not_broken_at_80_columns():
    rows = {name: [result('facemae', 0.9, 0.1, 0.3)] * 3
            for name in ('facemae', 'originals', 'a_row_of_a_long_name')}
    text = io.StringIO()
    for s in report.tables(rows, {}, 'facemae', {}):
        s.print(Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and '…' not in text.getvalue()
    assert sum(line.strip().startswith('a_row_of_a_long_name') for line in lines) >= 4

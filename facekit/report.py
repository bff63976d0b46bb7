"""Tables of a comparison: what a release is worth, what it gives away, by how much it is ahead.

They are gathered from {row: [results.json of each seed]}.
"""
import numpy as np
from rich.table import Column, Table

HAS = {        # what the attacker has, printed beside every number
    'judge': 'a recogniser of other people, off the shelf',
    'teacher': 'the very recogniser that shaped the release',
    'pixels': 'nothing: compares 16 x 16 pixels',
    'masked': 'the masks: compares visible pixels only',
    'visible': 'the unmasked patches of the original itself',
    'insider': 'the release: trains a recogniser on it',
    'linear': 'released images of other people and their originals: a linear map',
    'trained': 'the same pairs: trains a recogniser to see both alike',
    'class': 'the labels: averages all images of a person',
    'repeated': 'eight releases of the same photos with other masks',
    'membership_reconstruction': 'the model: AUC of telling the public faces it learnt from',
    'membership_recogniser': 'the recogniser of the release: AUC of telling who is in it',
}
MEANS = {
    'same_image': 'who holds the photo learns which released image was made of it',
    'same_person': 'who holds another photo of a person finds that person in the release',
}


def differences(ahead, method):
    """By how much a method is ahead of other rows, in points, as tables of two sets each; `ahead`
    = {row: {set: figures of verification.paired_difference()}}."""
    tables = []
    for names in two_by_two(next(iter(ahead.values()), {})):
        tables.append(Table(
            f'{method} minus', *(Column(f'{n} {m}', justify='right') for n in names
                                 for m in ('acc.', 'TAR@FAR 1%')), title_justify='left',
            title='points [95 % interval over pairs and seeds]'))
        for row, sets in ahead.items():
            tables[-1].add_row(row, *('{:+.1f} [{:+.1f}, {:+.1f}]'.format(*(100 * np.array(x)))
                                      for n in names for x in sets[n].values()))
    return tables


def two_by_two(names):
    """The names of verification sets as tables have room for them."""
    names = list(names)
    return [names[i:i + 2] for i in range(0, len(names), 2)]


def tables(found):
    """Utility, leakage and who the attackers are, in per cent, as rich tables;
    `found` = {row: [results of each seed]}."""
    released = {row: results for row, results in found.items() if 'privacy' in results[0]}
    rows = list(released.items())
    leakage = [leakage_table(dict(rows[i:i + 7])) for i in range(0, len(rows), 7)]
    return [*utility_tables(found), *leakage, *([attackers_table(released)] if released else [])]


def utility_tables(found):
    """Verification of people who are in no training, two sets a table."""
    measures = {'acc.': 'accuracy', 'AUC': 'auc', 'TAR@FAR 1%': 'tar@far=1e-2'}
    made = []
    for names in two_by_two(next(iter(found.values()))[0]['verification']):
        made.append(Table(
            'released set',
            *(Column(f'{n} {m}', justify='right') for n in names for m in measures),
            title_justify='left', title='utility: verification of other people, %'))
        for row, results in found.items():
            made[-1].add_row(row, *(cell([r['verification'][n][key] for r in results])
                                    for n in names for key in measures.values()))
    return made


def leakage_table(released):
    """Rank-1 or AUC of every attack, a column for each of the rows `released`."""
    table = Table('attack', *(Column(row, justify='right') for row in released),
                  Column('chance', justify='right'), title_justify='left',
                  title='leakage: found at the first guess, % [95 % interval over people]')
    for attack in dict.fromkeys(a for results in released.values() for a in results[0]['privacy']):
        cells, chance = [], ''
        for results in released.values():
            figures = [r['privacy'][attack] for r in results if attack in r['privacy']]
            if not figures:
                cells.append('')
                continue
            key = 'rank1' if 'rank1' in figures[0] else 'auc'
            cells.append(cell([f[key] for f in figures], figures[0].get('rank1_ci')))
            chance = f'{100 * figures[0].get("chance", 0.5):.2f}'
        table.add_row(attack.replace('_', ' '), *cells, chance)
    table.add_row('PSNR, dB', *(f'{np.mean([r["reconstruction"]["psnr"] for r in results]):.1f}'
                                for results in released.values()))
    return table


def attackers_table(released):
    """What each of the attackers has, and what the two questions mean."""
    table = Table('attacker', 'what it has', title='who tries', title_justify='left')
    attacks = {a for results in released.values() for a in results[0]['privacy']}
    for name, has in HAS.items():
        if any(attack.startswith(name) for attack in attacks):
            table.add_row(name.replace('_', ' '), has)
    for kind, meaning in MEANS.items():
        table.add_row(kind.replace('_', ' '), meaning)
    return table


def cell(values, interval=None):
    """Shares 0..1 of several seeds, or of one with its interval, as per cent."""
    values = 100 * np.array(values)
    if len(values) > 1:
        return f'{values.mean():.1f} ±{values.std(ddof=1):.1f}'
    bounds = ' [{:.0f}, {:.0f}]'.format(*(100 * np.array(interval))) if interval else ''
    return f'{values[0]:.1f}{bounds}'

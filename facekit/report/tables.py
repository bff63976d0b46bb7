"""Tables of a comparison, for the screen, a file and the page of a run: what a release is worth,
what it gives away, by how much the method is ahead, and whether the paper's claims are reached."""
from dataclasses import dataclass, field

import numpy as np
from rich import box
from rich.table import Column, Table

from facekit.measure import verification
from facekit.privacy.attacks import ATTACKERS
from facekit.privacy.protect import PROTECTIONS, visible_count

QUESTIONS = {'person': 'same_person', 'photo': 'same_image'}     # by its word in tables
LEAKAGE = {            # titles of the tables of attackers, by question and figure
    ('same_person', 'rank1'):
        'person: another photo of it is found first, its own original left out, %',
    ('same_person', 'each_person_once'):
        'person, with each person counted once, however many photos, %',
    ('same_image', 'rank1'):
        'photo: the original it was made from is found first among all, %',
    ('label', 'rank1'):
        "label: the mean of a person's other photos is found first among all means, %"}
MEASURES = {'acc.': 'accuracy', 'AUC': 'auc', 'TAR@1%': 'tar@far=1e-2'}
ROUNDED = 0.15     # points by which a mean and a deviation of one digit may be off
WIDE = 4           # attackers side by side in 80 columns


@dataclass
class Sheet:
    """A table: a title, names of columns, and rows of texts as long."""
    title: str
    columns: list
    rows: list
    text: bool = False        # whether all columns are text, not only the first

    def print(self, console):
        """On a rich console of 80 columns or more."""
        justify = 'left' if self.text else 'right'
        table = Table(self.columns[0], *(Column(c, justify=justify) for c in self.columns[1:]),
                      box=box.SIMPLE_HEAD, pad_edge=False)
        for row in self.rows:
            table.add_row(*row)
        console.print(self.title, style='bold', highlight=False)
        console.print(table)


@dataclass
class Row:
    """A row of a comparison: the results.json of each of its seeds. One without a release is a
    floor, and has `verification` alone."""
    name: str
    results: list = field(default_factory=list)
    scores: dict = field(default_factory=dict)    # {seed: {set: verification.PairScores}}

    def figures(self, *path):
        """What stands at a path of results.json, of each seed that has it."""
        found = self.results
        for key in path:
            found = [value[key] for value in found if key in value]
        return found

    def accuracy(self, sets):
        """Mean accuracy on verification sets, over seeds; NaN where it was not measured."""
        found = [a for name in sets for a in self.figures('verification', name, 'accuracy')]
        return float(np.mean(found)) if found else np.nan

    def strongest(self, question, attackers):
        """Rank 1 of the strongest of `attackers` and its 95 % interval, float64 (3,), mean of the
        seeds; NaN where none of them was tried."""
        seeds = []
        for privacy in self.figures('privacy'):
            tried = [privacy[f'{name}_{question}'] for name in attackers
                     if f'{name}_{question}' in privacy]
            if tried:
                best = max(tried, key=lambda figures: figures['rank1'])
                seeds.append([best['rank1'], *best.get('rank1_ci', [best['rank1']] * 2)])
        return np.mean(seeds, 0) if seeds else np.full(3, np.nan)


def comparable(rows):
    """Names of the attackers that count and were tried on every seed of all rows: the strongest of
    few is weaker than that of many."""
    left_out = [name for name, attacker in ATTACKERS.items()
                if not attacker.counts or 'same_person' not in attacker.questions]
    tried = set.intersection(*(set(names) for row in rows for names in row.figures('attacked')))
    return ordered(tried.difference(left_out))


def ordered(names):
    """Names of attackers in the order of ATTACKERS, then recognisers that the user named."""
    known = [name for name in ATTACKERS if name in names]
    return known + sorted(set(names) - set(known))


# ------------------------------------------------------------------------------------ tables

def tables(rows, ahead, method, references):
    """All Sheets of Rows; ahead: see leads(); method: name of the row that others are compared
    with; references: published or repeated rows of the config."""
    released = [row for row in rows if row.figures('privacy')]
    sheets = [*utility_tables(rows, references), *lead_tables(ahead, method)]
    if released:
        sheets += [*leakage_tables(released), quality_table(released),
                   *membership_table(released), *claims_table(rows, method),
                   attackers_table(released)]
    return [*sheets, *repetition_table(rows, references)]


def utility_tables(rows, references):
    """Verification of people who are in no training, a Sheet a set; published rows below."""
    sheets = []
    for name in rows[0].results[0]['verification']:
        measures = dict(MEASURES)
        if rows[0].figures('verification', name, 'tar@far=1e-4'):       # has pairs enough
            measures['TAR@0.01%'] = 'tar@far=1e-4'
        lines = [[row.name, *(percent(row.figures('verification', name, key))
                              for key in measures.values())] for row in rows]
        lines += [[f'{row} (published)', f'{values[name]:.1f}', *[''] * (len(measures) - 1)]
                  for row, values in references.items()
                  if isinstance(values.get(name), (int, float))]
        sheets.append(Sheet(f'utility: verification on {name}, %',
                            ['released set', *measures], lines))
    return sheets


def leads(rows, method):
    """By how much the row `method` is ahead of every other one: {row: {set: figures of
    verification.paired_difference()}}."""
    own, ahead = next((row.scores for row in rows if row.name == method), {}), {}
    for row in rows:
        if row.name == method or not row.scores:
            continue
        for name, first in next(iter(row.scores.values())).items():
            ours, theirs = ({seed: sets[name].distance for seed, sets in seeds.items()
                             if name in sets} for seeds in (own, row.scores))
            if gain := verification.paired_difference(ours, theirs, first.same):
                ahead.setdefault(row.name, {})[name] = gain
    return ahead


def lead_tables(ahead, method):
    """leads() in points, a Sheet a set."""
    return [Sheet(
        f'{method} minus ..., points on {name} [95 % interval over pairs and seeds]',
        [f'{method} minus', 'acc.', 'TAR@1%'],
        [[row, *('{:+.1f} [{:+.1f}, {:+.1f}]'.format(*(100 * np.array(gain)))
                 for gain in sets[name].values())] for row, sets in ahead.items()])
        for name in next(iter(ahead.values()), {})]


def leakage_tables(rows):
    """What every attacker finds, a Sheet for each question and a few attackers, with chance."""
    sheets = []
    for (question, key), title in LEAKAGE.items():
        names = ordered({name.removesuffix(f'_{question}') for row in rows
                         for privacy in row.figures('privacy') for name in privacy
                         if name.endswith(f'_{question}') and key in privacy[name]})
        for some in (names[i:i + WIDE] for i in range(0, len(names), WIDE)):
            paths = [('privacy', f'{name}_{question}') for name in some]
            lines = [[row.name, *(percent(row.figures(*path, key), row.figures(*path, f'{key}_ci'))
                                  for path in paths)] for row in rows]
            if key == 'rank1':
                chances = [[c for row in rows for c in row.figures(*path, 'chance')]
                           for path in paths]
                lines.append(['chance', *(f'{100 * first:.2f}' for first, *_ in chances)])
            sheets.append(Sheet(title, ['released set', *some], lines))
    return sheets


def quality_table(rows):
    """How far released images are from their originals."""
    lines = []
    for row in rows:
        psnr, ssim = (np.mean(row.figures('reconstruction', key)) for key in ('psnr', 'ssim'))
        lines.append([row.name, visible_patches(row.results[0]['config']), f'{psnr:.1f}',
                      f'{ssim:.3f}'])
    return Sheet('image quality (says nothing of identity)',
                 ['released set', 'visible patches', 'PSNR, dB', 'SSIM'], lines)


def visible_patches(config):
    """How many patches stay visible, '9 of 36'; of a release made elsewhere 'unknown'."""
    c = config['reconstruct']
    if config['release']:
        return 'unknown'
    if not PROTECTIONS[c['method']].draws_mask:
        return 'all'
    return '{} of {}'.format(*visible_count(
        config['data']['size'], config['mae']['patch'], c['mask_ratio']))


def membership_table(rows):
    """How well it can be told who was in the student's training; no Sheet if not tried."""
    lines = [[row.name, percent(row.figures('privacy', 'membership_recogniser', 'auc'))]
             for row in rows]
    if not any(share for _, share in lines):
        return []
    return [Sheet('membership: who trained the recogniser can be told, AUC, % (chance 50)',
                  ['released set', 'of the student'], lines)]


def attackers_table(rows):
    """What each of the attackers has."""
    has = {name: attacker.has for name, attacker in ATTACKERS.items()}
    for role in ('judge', 'teacher'):
        if path := rows[0].results[0]['config'][role]['checkpoint']:
            has[role] = f'the recogniser {path}, which you named'
    tried = ordered({name for row in rows for names in row.figures('attacked') for name in names})
    return Sheet('attackers (each tries several ways; the best one is reported)',
                 ['attacker', 'what it has'],
                 [[name, has.get(name, 'a recogniser that you named')] for name in tried],
                 text=True)


def repetition_table(rows, references):
    """Whether a run agrees with the [mean, standard deviation] of an earlier one of the same rows;
    no Sheet without such references."""
    lines, sources = [], {}
    for row in rows:
        for key, value in references.get(row.name, {}).items():
            if key in QUESTIONS:
                here = row.strongest(QUESTIONS[key], comparable([row]))[0]
            else:
                here = row.accuracy([key])
            if isinstance(value, list) and np.isfinite(here):
                near = abs(100 * here - value[0]) <= 2 * value[1] + ROUNDED
                lines.append([row.name, key, percent([here]), '{:.1f} ±{:.1f}'.format(*value),
                              'within 2 standard deviations' if near else 'differs'])
                sources[references[row.name]['source']] = True
    if not lines:
        return []
    return [Sheet(f'repetition, %; reference: {", ".join(sources)}',
                  ['row', 'figure', 'here', 'reference', 'verdict'], lines, text=True)]


# ------------------------------------------------------------------------- the paper's claims

def claims_table(rows, method):
    """The two claims of the abstract beside what was measured; no Sheet without a row `method` and
    a distortion to compare it with."""
    own = next((row for row in rows if row.name == method), None)
    distortions = [row for row in rows if row.figures('privacy') and row.name != method and
                   row.results[0]['config']['reconstruct']['method'] not in ('facemae', 'none')]
    sets = list(own.results[0]['verification']) if own else []
    if not distortions or not sets:
        return []
    attackers = comparable([own, *distortions])
    lines = [error_claim(own, distortions, name) for name in sets]
    floors = [row.name for row in rows if not row.figures('privacy')
              and row.accuracy(sets) >= own.accuracy(sets)]
    useful = [row for row in distortions if row.accuracy(sets) >= own.accuracy(sets)]
    for word, question in QUESTIONS.items():
        if floors:
            verdict = 'cannot be said', f'{method} is worth no more than {floors[0]}'
        else:
            verdict = leakage_claim(question, own, useful, attackers)
        lines.append([f'a fifth less leakage ({word}) than a distortion of no less use', *verdict])
    return [Sheet(f"the paper's claims; leakage: by the strongest of {', '.join(attackers)}",
                  ['claim', 'verdict', 'measured, %'], lines, text=True)]


def error_claim(own, distortions, name):
    """Whether the error on a verification set is at most half of the runner-up's: a line."""
    best = max(distortions, key=lambda row: row.accuracy([name]))
    ours, theirs = 1 - own.accuracy([name]), 1 - best.accuracy([name])
    return [f'half of the error of the best distortion on {name}',
            'reached' if ours <= 0.5 * theirs + 1e-9 else 'not reached',
            f'{percent([ours])} against {percent([theirs])} ({best.name})']


def leakage_claim(question, own, useful, attackers):
    """Whether a fifth less is found than of the best of the `useful` Rows, distortions that are
    worth at least as much: verdict and figures."""
    ours = own.strongest(question, attackers)
    if not useful or np.isnan(ours[0]):
        return 'cannot be said', 'no distortion here is worth as much'
    best = min(useful, key=lambda row: row.strongest(question, attackers)[0])
    theirs = best.strongest(question, attackers)
    figures = (f'{percent(ours[:1], [ours[1:]])} against {percent(theirs[:1], [theirs[1:]])} '
               f'({best.name})')
    if ours[0] > 0.8 * theirs[0] + 1e-9:
        return 'not reached', figures
    if ours[2] >= theirs[1]:
        return 'cannot be said', f'{figures}: intervals overlap'
    return 'reached', figures


def percent(shares, intervals=()):
    """Shares 0..1 of several seeds, or of one with its interval, as per cent; '' without any."""
    values = 100 * np.array(shares)
    if len(values) > 1:
        return f'{values.mean():.1f} ±{values.std(ddof=1):.1f}'
    if not len(values):
        return ''
    low, high = next(iter(intervals), (0, 0))
    return f'{values[0]:.1f}' + (f' [{100 * low:.0f}, {100 * high:.0f}]' if low < high else '')

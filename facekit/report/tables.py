"""Tables of a comparison, for the screen, files and the page of a run: what a release is worth,
what it gives away, by how much the method is ahead, and whether the paper's claims are reached."""
from dataclasses import dataclass, field

import numpy as np
from rich import box
from rich.table import Column, Table

from facekit.base.errors import counted
from facekit.measure import verification
from facekit.measure.statistics import interval_over_seeds, t_half_width
from facekit.privacy.attacks import ATTACKERS, STRONGEST
from facekit.privacy.protect import PROTECTIONS, visible_count

QUESTIONS = {'person': 'same_person', 'photo': 'same_image'}     # by its word in tables
LEAKAGE = {            # titles and meanings of the tables of attackers, by question and figure
    ('same_person', 'rank1'): (
        'person: another photo of the same person is found first, %',
        'Of all originals but the one that an image was made from, how often is the most similar '
        'one a photo of the same person? Chance: what guessing reaches. Lower is more private.'),
    ('same_person', 'each_person_once'): (
        'person, with each person counted once, however many photos, %',
        'The same as a mean over people: one with many photos is found more easily.'),
    ('same_image', 'rank1'): (
        'photo: the very original that it was made from is found first, %',
        'Somebody holds the very photo: how often is it the most similar of all originals?'),
    ('label', 'rank1'): (
        "label: the mean of a person's other photos is found first among all means, %",
        'Images of one person share a label. Their mean is compared with the means of people.'),
    ('recogniser', 'auc'): (
        'membership: who trained the recogniser can be told, AUC, % (chance 50)',
        'Can the recogniser that learnt from the release tell whose photos it was made of?')}
MEASURES = {'acc.': 'accuracy', 'AUC': 'auc', 'TAR@1%': 'tar@far=1e-2'}
UTILITY = ('Do two photos show one person? acc.: right answers, in ten folds. TAR@1%: pairs of '
           'one person that are accepted if 1 % of the others are. Pixel components are the '
           'floor: they learnt nothing about people.')
ROUNDED = 0.15     # points by which a mean and a deviation of one digit may be off
WIDE = 4           # attackers side by side in 80 columns


@dataclass
class Sheet:
    """A table: a title, names of columns, and rows of texts as long."""
    title: str
    columns: list
    rows: list
    text: bool = False        # whether all columns are text, not only the first
    meaning: str = ''         # a sentence or two for the page

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
class Leakage:
    """What the strongest attacker finds, shares 0..1 with a 95 % interval over people and seeds;
    NaN where none was tried."""
    rank1: float = np.nan
    low: float = np.nan
    high: float = np.nan
    probes: int = 0
    people: int = 0
    seeds: int = 0


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
        """The Leakage to the strongest of `attackers`, mean of the seeds; it is chosen by the half
        of the people that chose the attackers' ways, and reported on the other."""
        best = []
        for privacy in self.figures('privacy'):
            tried = [privacy[f'{name}_{question}'] for name in attackers
                     if f'{name}_{question}' in privacy]
            best += sorted(tried, key=lambda figures: figures['rank1_of_choosers'])[-1:]
        if not best:
            return Leakage()
        shares = [figures['rank1'] for figures in best]
        low, high = np.mean([figures['rank1_ci'] for figures in best], 0)
        mean, spread = np.mean(shares), t_half_width(shares)
        return Leakage(mean, max(0, mean - np.hypot(mean - low, spread)),
                       min(1, mean + np.hypot(high - mean, spread)), best[0]['probes'],
                       best[0]['people'], len(best))


def comparable(rows):
    """The attackers of STRONGEST that were tried on every seed of all rows: the strongest of few
    is weaker than that of many."""
    tried = [names for row in rows for names in row.figures('attacked')]
    return [name for name in STRONGEST if all(name in names for names in tried)]


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
                   *claims_table(rows, method), attackers_table(released)]
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
                            ['released set', *measures], lines, meaning=UTILITY))
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
                 for gain in sets[name].values())] for row, sets in ahead.items()],
        meaning=f'Above 0: {method} teaches more. An interval that holds 0 decides nothing.')
        for name in next(iter(ahead.values()), {})]


def leakage_tables(rows):
    """What every attacker finds, a Sheet for each question and a few attackers, with chance."""
    sheets = []
    for (question, key), (title, meaning) in LEAKAGE.items():
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
            sheets.append(Sheet(title, ['released set', *some], lines, meaning=meaning))
    return sheets


def quality_table(rows):
    """How far released images are from their originals."""
    lines = []
    for row in rows:
        config = row.results[0]['config']
        c, visible = config['reconstruct'], 'all'
        if config['release']:
            visible = 'unknown'
        elif PROTECTIONS[c['method']].draws_mask:
            visible = '{} of {}'.format(*visible_count(
                config['data']['size'], config['mae']['patch'], c['mask_ratio']))
        psnr, ssim = (np.mean(row.figures('reconstruction', key)) for key in ('psnr', 'ssim'))
        lines.append([row.name, visible, f'{psnr:.1f}', f'{ssim:.3f}'])
    return Sheet('image quality (says nothing of identity)',
                 ['released set', 'visible patches', 'PSNR, dB', 'SSIM'], lines,
                 meaning='How near a released image is to its original, pixel by pixel.')


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
                 text=True, meaning=f'The strongest is taken among {", ".join(STRONGEST)}, which '
                 'need one release and no secret, whatever others are tried. It and its way are '
                 'chosen on half of the people and reported on the other half.')


def repetition_table(rows, references):
    """Whether a run agrees with the [mean, standard deviation] of an earlier one of the same rows;
    no Sheet without such references."""
    lines, sources = [], {}
    for row in rows:
        for key, value in references.get(row.name, {}).items():
            if key in QUESTIONS:
                here = row.strongest(QUESTIONS[key], comparable([row])).rank1
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
                  ['row', 'figure', 'here', 'reference', 'verdict'], lines, text=True,
                  meaning='Does this run agree with an earlier one of the same settings?')]


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
    attackers, lines = comparable([own, *distortions]), []
    floors = [row for row in rows if not row.figures('privacy')]
    claims = [(f'half of the error of the best distortion on {name}', [name],
               error_claim(own, distortions, name)) for name in sets]
    claims += [(f'a fifth less leakage ({word}) than a distortion of no less use', sets,
                leakage_claim(question, own, distortions, sets, attackers))
               for word, question in QUESTIONS.items()]
    for claim, tested, (verdict, measured) in claims:
        # Where nothing was learnt, little leaks, and neither says anything
        reached = [row.name for row in floors if row.accuracy(tested) >= own.accuracy(tested)]
        if reached:
            verdict = 'cannot be said'
            measured = f'{method} is worth no more than {reached[0]}: {measured}'
        lines.append([claim, verdict, measured])
    has = '; '.join(f'{name}: {ATTACKERS[name].has}' for name in attackers)
    return [Sheet(f"the paper's claims; leakage: by the strongest of {', '.join(attackers)}",
                  ['claim', 'verdict', 'measured, % [95 % interval]'], lines, text=True,
                  meaning='"Cannot be said": the interval leaves both answers open, or nothing '
                  f'was learnt. What these attackers have: {has}.')]


def error_claim(own, distortions, name):
    """Whether the error on a verification set is at most half of the runner-up's: verdict and
    figures. The interval of the difference is over pairs and seeds."""
    best = max(distortions, key=lambda row: row.accuracy([name]))
    seeds = [seed for seed in own.scores
             if name in own.scores[seed] and name in best.scores.get(seed, {})]
    if not seeds:
        return 'cannot be said', f'{own.name} and {best.name} share no seed'
    wrong = [np.stack([row.scores[seed][name].wrong() for seed in seeds]) for row in (own, best)]
    rng = np.random.default_rng(0)
    ours, theirs, beyond = (interval_over_seeds(values, rng) for values in (
        *wrong, wrong[0] - 0.5 * wrong[1]))
    measured = (f'{percent(ours[:1], [ours[1:]])} against {percent(theirs[:1], [theirs[1:]])} '
                f'({best.name}); {counted(wrong[0].shape[1], "pair")}, '
                f'{counted(len(seeds), "seed")}')
    return verdict_of(beyond[1], beyond[2]), measured


def leakage_claim(question, own, distortions, sets, attackers):
    """Whether a fifth less is found than of the best distortion that is worth at least as much on
    `sets`: verdict and figures.

    results.json has no hits of each person, so that people are not drawn together for both rows.
    The verdict is on the safe side: the nearer ends of both intervals decide.
    """
    ours = own.strongest(question, attackers)
    useful = [row for row in distortions if row.accuracy(sets) >= own.accuracy(sets)]
    if not useful or np.isnan(ours.rank1):
        return 'cannot be said', 'no distortion here is worth as much'
    best = min(useful, key=lambda row: row.strongest(question, attackers).rank1)
    theirs = best.strongest(question, attackers)
    measured = (f'{percent([ours.rank1], [(ours.low, ours.high)])} against '
                f'{percent([theirs.rank1], [(theirs.low, theirs.high)])} ({best.name}); '
                f'{counted(ours.probes, "probe")} of {ours.people} people, '
                f'{counted(ours.seeds, "seed")}')
    return verdict_of(ours.low - 0.8 * theirs.high, ours.high - 0.8 * theirs.low), measured


def verdict_of(low, high):
    """The verdict on a claim that something is 0 or less, by its interval."""
    if high <= 1e-9:
        return 'reached'
    return 'not reached' if low > 1e-9 else 'cannot be said'


def percent(shares, intervals=()):
    """Shares 0..1 of several seeds, or of one with its interval, as per cent; '' without any."""
    values = 100 * np.array(shares)
    if len(values) > 1:
        return f'{values.mean():.1f} ±{values.std(ddof=1):.1f}'
    if not len(values):
        return ''
    low, high = next(iter(intervals), (0, 0))
    return f'{values[0]:.1f}' + (f' [{100 * low:.0f}, {100 * high:.0f}]' if low < high else '')

"""Tables of a comparison, for the screen, a file and the page of a run.

They are gathered from {row: [results.json of each seed]}: what a release is worth, what it gives
away, by how much the method is ahead, and whether the paper's two claims are reached.
"""
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.table import Column, Table

from facekit.attacks import ATTACKERS
from facekit.protect import PROTECTIONS, visible_count

QUESTIONS = {
    'same_person': 'person: among all originals but its own, one of the person comes first, %',
    'same_image': 'photo: among all originals, the very photo it was made from comes first, %',
    'label': "label: of the means of all people's originals, the person's comes first, %",
}
EACH_ONCE = 'person, where each person counts once, with many photos or few, %'
QUESTION_OF = {'person': 'same_person', 'photo': 'same_image'}     # by its word in other tables
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


def tables(rows, ahead, method, references):
    """All Sheets of a comparison.

    rows = {name: [results of each seed]}; ahead: see lead_sheets(); method: its row; references:
    published or repeated rows of the config.
    """
    released = {row: results for row, results in rows.items() if 'privacy' in results[0]}
    sheets = [*utility_sheets(rows, references), *lead_sheets(ahead, method)]
    if released:
        sheets += [*leakage_sheets(released), *membership_sheets(released),
                   *claim_sheets(released, method), attackers_sheet(released)]
    return [*sheets, *repetition_sheets(rows, references)]


def utility_sheets(measured, references):
    """Verification of people who are in no training, a Sheet a set; published rows below."""
    sheets = []
    for name in next(iter(measured.values()))[0]['verification']:
        rows = [[row, *(cell([r['verification'][name][key] for r in results])
                        for key in MEASURES.values())] for row, results in measured.items()]
        rows += [[f'{row} (published)', f'{values[name]:.1f}', '', '']
                 for row, values in references.items()
                 if isinstance(values.get(name), (int, float))]
        sheets.append(Sheet(f'utility: verification of other people on {name}, %',
                            ['released set', *MEASURES], rows))
    return sheets


def repetition_sheets(measured, references):
    """Whether a run agrees with the [mean, standard deviation] of an earlier one of the same rows;
    no Sheet without such references."""
    rows = []
    for row, values in references.items():
        for key, value in values.items() if row in measured else ():
            if not isinstance(value, list):
                continue
            here = np.mean([100 * figure_of(r, key) for r in measured[row]])
            near = abs(here - value[0]) <= 2 * value[1] + ROUNDED
            if np.isfinite(here):
                rows.append([row, key, f'{here:.1f}', '{:.1f} ±{:.1f}'.format(*value),
                             'within 2 standard deviations' if near else 'differs'])
    sources = dict.fromkeys(references[row[0]]['source'] for row in rows)
    return [Sheet(f'repetition, %; reference: {", ".join(sources)}',
                  ['row', 'figure', 'here', 'reference', 'verdict'], rows, text=True)] * bool(rows)


def figure_of(results, key):
    """Accuracy on a verification set, or rank 1 of the strongest attack on `person` or `photo`;
    NaN for what was not measured."""
    if key in QUESTION_OF:
        return strongest_attack(results.get('privacy', {}), QUESTION_OF[key])
    return results['verification'].get(key, {}).get('accuracy', np.nan)


def leakage_sheets(released):
    """Rank 1 of every attack, a Sheet for each question and a few attackers, with chance below."""
    sheets = []
    for kind, key, title in (('same_person', 'rank1', QUESTIONS['same_person']),
                             ('same_person', 'each_person_once', EACH_ONCE),
                             ('same_image', 'rank1', QUESTIONS['same_image']),
                             ('label', 'rank1', QUESTIONS['label'])):
        figures = {row: [of_question(r['privacy'], kind) for r in results]
                   for row, results in released.items()}
        names = list(dict.fromkeys(a for seeds in figures.values() for a in seeds[0]
                                   if key in seeds[0][a]))
        for some in (names[i:i + WIDE] for i in range(0, len(names), WIDE)):
            rows = [[row, *(cell([s[a][key] for s in seeds if a in s],
                                 seeds[0].get(a, {}).get(f'{key}_ci')) for a in some)]
                    for row, seeds in figures.items()]
            chance = [next((f'{100 * s[a]["chance"]:.2f}' for seeds in figures.values()
                            for s in seeds if a in s), '') for a in some]
            below = [['chance', *chance]] if key == 'rank1' else []
            sheets.append(Sheet(title, ['released set', *some], [*rows, *below]))
    quality = [[row, visible_patches(results[0]['config']), *(
        f'{np.mean([r["reconstruction"][key] for r in results]):.{digits}f}'
        for key, digits in (('psnr', 1), ('ssim', 3)))] for row, results in released.items()]
    return [*sheets, Sheet('image quality (says nothing of identity)',
                           ['released set', 'visible patches', 'PSNR, dB', 'SSIM'], quality)]


def visible_patches(config):
    """How many patches of an image stay visible, '9 of 36'; 'all' where none is hidden, 'unknown'
    of a release made elsewhere."""
    c = config['reconstruct']
    if config['release']:
        return 'unknown'
    if not PROTECTIONS[c['method']].draws_mask:
        return 'all'
    visible, patches = visible_count(config['data']['size'], config['mae']['patch'],
                                     c['mask_ratio'])
    return f'{visible} of {patches}'


def of_question(privacy, kind):
    """{attack: figures} of one question."""
    return {name.removesuffix(f'_{kind}'): figures for name, figures in privacy.items()
            if name.endswith(f'_{kind}')}


def strongest_attack(privacy, kind):
    """Rank 1 of the strongest attack of a question that counts, {attack_kind: figures}; NaN
    without one. Recognisers that are named by their path count, too."""
    return max((figures['rank1'] for name, figures in of_question(privacy, kind).items()
                if name not in ATTACKERS or ATTACKERS[name].counts), default=np.nan)


def membership_sheets(released):
    """How well it can be told who was in a training, AUC in per cent; no Sheet if not tried."""
    names = {'membership_recogniser': 'of the student'}
    rows = [[row, *(cell([r['privacy'][name]['auc'] for r in results if name in r['privacy']])
                    for name in names)] for row, results in released.items()]
    if not any(text for row in rows for text in row[1:]):
        return []
    return [Sheet('who was in the training can be told, AUC, % (chance 50)',
                  ['released set', *names.values()], rows)]


def attackers_sheet(released):
    """What each of the attackers has."""
    tried = {a for results in released.values() for kind in QUESTIONS
             for a in of_question(results[0]['privacy'], kind)}
    names = [name for name in ATTACKERS if name in tried] + sorted(tried - set(ATTACKERS))
    has = {name: attacker.has for name, attacker in ATTACKERS.items()}
    for role in ('judge', 'teacher'):
        if path := next(iter(released.values()))[0]['config'][role]['checkpoint']:
            has[role] = f'the recogniser {path}, which you named'
    return Sheet('attackers', ['attacker', 'what it has'], [
        [name, has.get(name, 'a recogniser that you named')] for name in names], text=True)


def lead_sheets(ahead, method):
    """By how much the method is ahead of other rows, in points; ahead = {row: {set: figures of
    verification.paired_difference()}}."""
    names = next(iter(ahead.values()), {})
    return [Sheet(
        f'{method} minus ..., points on {name} [95 % interval over pairs and seeds]',
        [f'{method} minus', 'acc.', 'TAR@1%'],
        [[row, *('{:+.1f} [{:+.1f}, {:+.1f}]'.format(*(100 * np.array(x)))
                 for x in sets[name].values())] for row, sets in ahead.items()])
        for name in names]


# ------------------------------------------------------------------- the paper's two claims

def claim_sheets(released, method):
    """The two claims of the abstract beside what was measured: at most half of the runner-up's
    error on each set, and a fifth less leakage than what is worth no more; no Sheet without a
    method and a distortion to compare it with."""
    own = released.get(method)
    distortions = {row: results for row, results in released.items() if row != method and
                   results[0]['config']['reconstruct']['method'] not in ('facemae', 'none')}
    if not own or not distortions or not own[0]['verification']:
        return []

    def mean(results, figure):
        return float(np.mean([figure(r) for r in results]))

    rows = []
    for name in own[0]['verification']:
        errors = {row: mean(results, lambda r: 1 - r['verification'][name]['accuracy'])
                  for row, results in {method: own, **distortions}.items()}
        best = min(distortions, key=errors.get)
        rows.append([f'half of the error of the best distortion on {name}',
                     verdict(errors[method] <= 0.5 * errors[best] + 1e-9),
                     f'{100 * errors[method]:.1f} against {100 * errors[best]:.1f} ({best})'])

    def accuracy(r):
        return np.mean([s['accuracy'] for s in r['verification'].values()])

    useful = {row: results for row, results in distortions.items()
              if mean(results, accuracy) >= mean(own, accuracy)}
    for word, kind in QUESTION_OF.items():
        leak = {row: mean(results, lambda r: strongest_attack(r['privacy'], kind))
                for row, results in useful.items()}
        ours = mean(own, lambda r: strongest_attack(r['privacy'], kind))
        claim = f'a fifth less leakage ({word}) than a distortion of no less use'
        if not leak or not np.isfinite(ours):
            rows.append([claim, 'cannot be said', 'no distortion here is worth as much'])
            continue
        least = min(leak, key=leak.get)
        rows.append([claim, verdict(ours <= 0.8 * leak[least] + 1e-9),
                     f'{100 * ours:.1f} against {100 * leak[least]:.1f} ({least})'])
    return [Sheet("the paper's claims", ['claim', 'verdict', 'measured, %'], rows, text=True)]


def verdict(reached):
    """The word for a claim."""
    return 'reached' if reached else 'not reached'


def cell(values, interval=None):
    """Shares 0..1 of several seeds, or of one with its interval, as per cent; '' without any."""
    values = 100 * np.array(values)
    if len(values) > 1:
        return f'{values.mean():.1f} ±{values.std(ddof=1):.1f}'
    if not len(values):
        return ''
    low, high = 100 * np.array(interval or [0, 0])
    return f'{values[0]:.1f}' + (f' [{low:.0f}, {high:.0f}]' if low < high else '')

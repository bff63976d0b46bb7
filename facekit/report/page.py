"""report.html: one page of a run, with tables and pictures in it and nothing from elsewhere."""
import base64
import os
from html import escape
from pathlib import Path

import yaml

from facekit.base import files
from facekit.base.config import CONFIGS
from facekit.report.tables import Sheet

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 0 auto; padding: 1em;
       color: #222; background: #fff; overflow-wrap: anywhere }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin: 2em 0 .4em }
h1::first-letter, h2::first-letter { text-transform: uppercase }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.text th, .text td { text-align: left; vertical-align: top }
table:not(.text) td { white-space: nowrap } .meaning { margin: .2em 0 .6em; color: #555 }
.wide { overflow-x: auto } img { max-width: 100%; height: auto }
.warning { border-left: 4px solid #d1495b; padding: .4em 1em; background: #fbf1f2 }
pre { white-space: pre-wrap; font-size: 13px } summary { margin: 2em 0; cursor: pointer }
@media (max-width: 520px) {
  body { padding: .6em } table { font-size: 12px } th, td { padding: .2em .3em }
  .wide img { max-width: none; width: 640px } }
@media print { body { max-width: none; font-size: 10pt; padding: 0 } .wide { overflow: visible }
               h2, .meaning { break-after: avoid } tr, img { break-inside: avoid } }
"""
WARNING = """The released people are not anonymous. Their images are meant to be harder to
re-identify; for which attackers, and how much harder, is what these tables say, and nothing beyond
them. The pictures below show originals: keep this page where the originals are kept."""
FIRST = {'release.png': 'Top row: originals; last row: what is released'}
LAST = {'tradeoff.png': 'Privacy against utility: left is more private, up is more useful',
        'roc.png': 'Verification: the higher a curve, the more useful the release',
        'release_most_linked.png': 'The released images of whose originals one attacker is surest',
        'losses.png': 'Losses in training: they fall in the end; a recogniser\'s rises while its '
                      'margin sets in, and that of relations begins after a warm-up'}
EXPLAINED = {'docs/usage.md': 'the guide', 'facekit/privacy/attacks.py': 'the attackers, as code',
             'results/README.md': 'what was measured before'}


def html_table(sheet):
    """A Sheet as HTML."""
    def row(cells, kind):
        return '<tr>' + ''.join(f'<{kind}>{escape(str(c))}</{kind}>' for c in cells) + '</tr>'
    body = ''.join(row(cells, 'td') for cells in sheet.rows)
    table = '<table class="text">' if sheet.text else '<table>'
    meaning = f'<p class="meaning">{escape(sheet.meaning)}</p>' if sheet.meaning else ''
    return (f'<h2>{escape(sheet.title)}</h2>{meaning}<div class="wide">{table}'
            f'{row(sheet.columns, "th")}{body}</table></div>')


def html_pictures(folder, titles):
    """The PNG files of a folder that are there, {name: title}, inside the page."""
    parts = []
    for name, title in titles.items():
        if (folder / name).is_file():
            content = base64.b64encode((folder / name).read_bytes()).decode()
            parts.append(f'<h2>{escape(title)}</h2><div class="wide"><img alt="{escape(title)}" '
                         f'src="data:image/png;base64,{content}"></div>')
    return parts


def pairs_of(results, *names):
    """Rows [key, text] of what stands under some names of results.json."""
    return [[key, str(value)] for name in names for key, value in results.get(name, {}).items()]


def write_page(folder, sheets, results):
    """Write <folder>/report.html of a run: its picture, verdicts, Sheets, the other pictures in
    <folder>/figures, and what made them, by the results.json of one row."""
    folder = Path(folder)
    config = {k: v for k, v in results.get('config', {}).items()
              if k not in ('compare', 'base', 'reference')}
    made = Sheet('Made with', ['', ''], pairs_of(results, 'made_with', 'people'),
                 meaning='Versions; how many people and images are released, and how many are not '
                         'and why.')
    seconds = Sheet('Seconds of each stage', ['', ''], pairs_of(results, 'seconds'))
    links = ', '.join(
        f'<a href="{escape(os.path.relpath(CONFIGS.parent / name, folder))}">{text}</a>'
        for name, text in EXPLAINED.items())
    verdicts_first = sorted(sheets, key=lambda sheet: 'claims' not in sheet.title)
    parts = [*html_pictures(folder / 'figures', FIRST), *map(html_table, verdicts_first),
             f'<p>How attackers work, and what was found with them: {links}.</p>',
             *html_pictures(folder / 'figures', LAST), html_table(made),
             f'<details><summary>Seconds and settings</summary>{html_table(seconds)}'
             f'<h2>Settings</h2><pre>{escape(yaml.safe_dump(config, sort_keys=False))}</pre>'
             '</details>']
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{escape(folder.name)}</title>'
            f'<style>{STYLE}</style><h1>FaceMAE kit: {escape(folder.name)}</h1>'
            f'<p class="warning">{WARNING}</p>{"".join(parts)}</html>\n')
    with files.replacing(folder / 'report.html', private=True) as file:
        file.write(page.encode())

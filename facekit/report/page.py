"""report.html: one page of a run, with tables and pictures in it and nothing from elsewhere."""
import base64
from html import escape
from pathlib import Path

import yaml

from facekit.base import files
from facekit.report.tables import Sheet

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 0 auto; padding: 1em;
       color: #222; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin: 2em 0 .4em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.text th, .text td { text-align: left } table:not(.text) td { white-space: nowrap }
.wide { overflow-x: auto } img { max-width: 100%; height: auto }
.warning { border-left: 4px solid #d1495b; padding: .4em 1em; background: #fbf1f2 }
pre { white-space: pre-wrap; font-size: 13px }
"""
WARNING = """The released people are not anonymous. Their images are meant to be harder to
re-identify; for which attackers, and how much harder, is what these tables say, and nothing beyond
them. The pictures below show originals: keep this page where the originals are kept."""
PICTURES = {'release.png': 'Originals, what the mask leaves, what is released',
            'tradeoff.png': 'Privacy against utility', 'roc.png': 'Verification',
            'release_most_linked.png': 'Released images that are linked to their originals first'}


def html_table(sheet):
    """A Sheet as HTML."""
    def row(cells, kind):
        return '<tr>' + ''.join(f'<{kind}>{escape(str(c))}</{kind}>' for c in cells) + '</tr>'
    body = ''.join(row(cells, 'td') for cells in sheet.rows)
    table = '<table class="text">' if sheet.text else '<table>'
    return (f'<h2>{escape(sheet.title)}</h2><div class="wide">{table}{row(sheet.columns, "th")}'
            f'{body}</table></div>')


def picture(path, title):
    """A PNG file inside the page, or nothing if it is missing."""
    if not path.is_file():
        return ''
    content = base64.b64encode(path.read_bytes()).decode()
    title = escape(title)
    return f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{content}">'


def write_page(folder, sheets, results):
    """Write <folder>/report.html of a run: its Sheets, the pictures in <folder>/figures, and what
    made them, by the results.json of one row."""
    folder = Path(folder)
    config = {k: v for k, v in results.get('config', {}).items()
              if k not in ('compare', 'base', 'reference')}
    stages = Sheet('Wall time of the stages', ['stage', 'seconds'],
                   [[stage, f'{s:.1f}'] for stage, s in results.get('seconds', {}).items()])
    made = Sheet('Made with', ['', ''], [[k, str(v)] for k, v in {
        **results.get('made_with', {}), **results.get('people', {})}.items()])
    parts = [html_table(sheet) for sheet in sheets]
    parts += [picture(folder / 'figures' / name, title) for name, title in PICTURES.items()]
    parts += [html_table(made), html_table(stages),
              f'<h2>Settings</h2><pre>{escape(yaml.safe_dump(config, sort_keys=False))}</pre>']
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{escape(folder.name)}</title>'
            f'<style>{STYLE}</style><h1>FaceMAE kit: {escape(folder.name)}</h1>'
            f'<p class="warning">{WARNING}</p>{"".join(parts)}</html>\n')
    with files.replacing(folder / 'report.html') as file:
        file.write(page.encode())

"""What a row and a run hand on as files: scores, embeddings, tables, and figures to publish. All
processes call these functions, and rank 0 writes."""
import csv
import io

import numpy as np

from facekit.base import files, process
from facekit.privacy.attacks import ATTACKERS


def write_csv(path, lines):
    """Write lines of values as CSV."""
    if process.rank():
        return
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(lines)
    with files.replacing(path) as file:
        file.write(text.getvalue().encode())


def write_pairs(path, scores):
    """Write PairScores as CSV: distance 0..4 and whether it is one person (1 or 0), a line a pair
    in the order of the set."""
    write_csv(path, [('distance', 'same'), *zip(scores.distance, scores.same.astype(int))])


def write_sheets(path, sheets):
    """Write Sheets as one CSV file: the title, the columns and the rows of each, an empty line."""
    write_csv(path, [line for sheet in sheets
                     for line in ([sheet.title], sheet.columns, *sheet.rows, [])])


def write_embeddings(path, embeddings):
    """Write {name: float32 (N, d)} as .npz, which its owner alone can read: embeddings of faces
    tell who is shown."""
    if process.rank():
        return
    with files.replacing(path, private=True) as file:
        np.savez(file, **{f'embeddings of {name}': z for name, z in embeddings.items()})


def measured(results):
    """Of results.json the figures that may be published beside a release: no digests, settings,
    or names of files, such as those of recognisers that the user named as attackers."""
    ours = {f'{name}_{question}' for name, attacker in ATTACKERS.items()
            for question in attacker.questions}
    privacy = {key: {name: value for name, value in figures.items() if name != 'way'}
               for key, figures in results.get('privacy', {}).items() if key in ours}
    verified = {name: {key: value for key, value in figures.items() if key != 'sha256'}
                for name, figures in results['verification'].items()}
    return {'verification': verified, 'privacy': privacy,
            'reconstruction': results.get('reconstruction', {})}

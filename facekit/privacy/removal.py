"""What was made of people who are taken out of a run, and has to go with them."""
import shutil
from pathlib import Path

from facekit.base import process
from facekit.nets.weights import load_checkpoint

# What has figures, pictures or images of people: of each row, and of the whole run
OF_A_ROW = ('reconstructed', 'reconstructed.tmp', 'release.json', 'fr.pt', 'results.json',
            'measured.json', 'scores', 'embeddings.npz')
OF_THE_RUN = ('comparison.json', 'table.txt', 'tables.csv', 'report.html', 'figures',
              'log/evaluate', 'log/evaluate.jsonl', 'log/reconstruct', 'log/reconstruct.jsonl',
              'log/student', 'log/student.jsonl')


def results_of(rows):
    """What is there of OF_A_ROW and OF_THE_RUN of Variants of one run, a list of paths, with what
    others' models and releases found on its photos."""
    paths = [row.folder / name for row in rows for name in OF_A_ROW]
    paths += [path for row in rows for path in sorted(row.folder.glob('external*'))]
    paths += [rows[0].run / name for name in OF_THE_RUN]
    return [path for path in paths if path.exists()]


def nets_of_removed(cfg, before, after):
    """The checkpoints of a run that learnt from images which are public in the Folds `before`, but
    not any more in those `after`: they learnt from who was taken out."""
    found = []
    for old, new in zip(before, after):
        for path in sorted(Path(cfg.run.folder, f'fold{old.k}').glob('*.pt')):
            saved = load_checkpoint(path)
            if old.taught(saved) and not new.taught(saved):
                found.append(path)
    return found


def delete(paths):
    """Delete files and folders, and say so."""
    for path in paths:
        process.say(f'deletes {path}')
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

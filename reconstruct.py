"""Stage 2 of FaceMAE: turn the private faces into the set that is released.

    python reconstruct.py
    torchrun --nproc_per_node=8 reconstruct.py --config configs/casia.yaml
    python reconstruct.py reconstruct.method=pixelate run.folder=runs/pixelate     # a baseline
    python reconstruct.py reconstruct.photos=FOLDER      # a picture of your own aligned photos

Reads   data.root, <run>/fold<k>/mae.pt (method facemae)
Writes  <run>/<row>/reconstructed/ (train.rec, train.idx, property, manifest.json, README.md),
        <run>/release.key, <run>/figures/<row>.png

Labels are renumbered and images reordered by a secret in release.key, which is not released; the
masks come from it, too. Every image of fold k is made by the model that never saw its people.
An interrupted release continues where it was; the result is the same for any number of processes.
"""
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from einops import rearrange, reduce, repeat

import batches
import checkpoint
import data
import embed
import models
import records
import runtime
from checkpoint import fingerprint, release_secret, secret_seed
from config import as_dict, rows
from figures import save_grid
from records import InputError
from train_mae import make_model, visible_patches

# A release made under other values of these, or from other images, would be a lie
FIXED = ['mae.patch', 'reconstruct', 'data.size', 'data.folds', 'data.release_folds', 'run.seed']
PART = 2048     # images between two points where an interrupted release can continue
STRENGTH = {'facemae': 'mask_ratio', 'mask': 'mask_ratio', 'blur': 'blur_sigma',
            'pixelate': 'pixelate_block', 'noise': 'noise_std'}


def premises_of(row, folds, secret):
    """What a release is made from, for release.json."""
    made = [row.mae(f.k) for f in folds if row.cfg.reconstruct.method == 'facemae']
    return {'config': as_dict(row.cfg), 'images': data.private_digest(folds),
            'secret': fingerprint(secret),
            'mae': [fingerprint(path.read_bytes()) for path in made]}


def check_release(target, premises, cfg):
    """Refuse a finished release that was made with another config, secret, model or images.

    Its images could not be matched with their originals any more, and would look private.
    """
    saved = checkpoint.read_json(target.parent / 'release.json')
    fixed = FIXED[STRENGTH.get(cfg.reconstruct.method) != 'mask_ratio':]     # others have no patch
    checkpoint.same_premises(saved, cfg, fixed, target, premises['images'])
    for what in ('secret', 'mae'):
        if what in premises and what in saved and premises[what] != saved[what]:
            raise InputError(f'{target} was made with another {what}: give reconstruct.key or '
                             'mae.name as then, use another run.folder, or delete the release')


def release_order(folds, secret, images_per_person=0):
    """Which private image stands where in the release, arrays of length N.

    Returns fold (position in `folds`), image (row of the private set), label (0..C-1, rising).
    People come in secret order, and each person's images.
    """
    rng = np.random.default_rng(secret_seed(secret, 'order'))
    fold = np.repeat(np.arange(len(folds)), [len(f.private) for f in folds])
    image = np.concatenate([f.private for f in folds])
    person = data.renumber(folds[0].private_data.labels[image])
    label = rng.permutation(person.max() + 1)[person]
    order = rng.permutation(len(image))
    order = order[np.argsort(label[order], kind='stable')]
    fold, image, label = fold[order], image[order], label[order]
    if images_per_person:
        first = np.searchsorted(label, label)              # where this person's images begin
        kept = np.arange(len(label)) - first < images_per_person
        fold, image, label = fold[kept], image[kept], label[kept]
    return fold, image, label


def load_maes(row, folds, device):
    """The finished masked autoencoder of each fold, or None for methods that need none."""
    return [load_mae(row.mae(f.k), row.cfg.data.size, device, runtime.again('train_mae.py'))
            if row.cfg.reconstruct.method == 'facemae' else None for f in folds]


def load_mae(path, size, device, made_by):
    """A finished masked autoencoder with its normalisation: namespace(model, mean, std)."""
    saved = checkpoint.load_finished(path, made_by)
    config = SimpleNamespace(mae=SimpleNamespace(**saved['config']['mae']))
    if config.mae.norm_pix_loss:
        raise InputError(f'{path} was trained with mae.norm_pix_loss: undoing it needs the hidden '
                         'pixels and would leak them; train with mae.norm_pix_loss=false')
    if saved['config']['data']['size'] != size:
        raise InputError(f'{path} was trained at {saved["config"]["data"]["size"]} pixels, '
                         f'data.size is {size}: set them alike')
    try:
        model = make_model(config, size)
    except (TypeError, AttributeError, RuntimeError):              # a file can hold anything
        raise InputError(f'{path} has a damaged config: delete it and make it again') from None
    embed.fill(model, saved, path)
    return SimpleNamespace(model=model.to(device).eval(), mean=saved['mean'].to(device),
                           std=saved['std'])


def masked(x, noise, ratio, patch):
    """Images (B, 3, H, W) in 0..1 with hidden patches grey."""
    mask = models.random_masking(noise, ratio)[2]                                 # (B, L)
    side = x.shape[-1] // patch
    hidden = repeat(mask, 'b (h w) -> b 1 (h p) (w q)', h=side, p=patch, q=patch)
    return torch.where(hidden > 0, 0.5, x)


@torch.inference_mode()
def protect(images, numbers, seed, cfg, mae=None):
    """Images as they are released: uint8 (B, H, W, 3) -> uint8 (B, H, W, 3).

    `numbers` (B,) are the images' numbers in the private set: with `seed` they alone decide masks
    and noise. Methods facemae and mask never read a hidden pixel.
    """
    c, size = cfg.reconstruct, images.shape[1]
    x = images.permute(0, 3, 1, 2).float() / 255
    if STRENGTH.get(c.method) == 'mask_ratio':
        noise = batches.hashed(seed, 0, numbers, (size // cfg.mae.patch) ** 2)
    if c.method == 'mask':
        x = masked(x, noise, c.mask_ratio, cfg.mae.patch)
    elif c.method == 'blur':
        x = TF.gaussian_blur(x, 2 * math.ceil(3 * c.blur_sigma) + 1, c.blur_sigma)
    elif c.method == 'pixelate':
        blocks = F.pad(x, [0, -size % c.pixelate_block] * 2, mode='replicate')
        small = reduce(blocks, 'b c (h p) (w q) -> b c h w', 'mean', p=c.pixelate_block,
                       q=c.pixelate_block)
        x = repeat(small, 'b c h w -> b c (h p) (w q)', p=c.pixelate_block,
                   q=c.pixelate_block)[..., :size, :size]
    elif c.method == 'noise':
        u = batches.uniform(batches.hashed(seed + 1, 0, numbers, 3 * size * size))
        x = x + c.noise_std / 255 * math.sqrt(2) * torch.erfinv(2 * u - 1).view_as(x)
    elif c.method == 'facemae':
        model, visible = mae.model, (x - mae.mean) / mae.std
        with runtime.autocast(x.device, cfg.run.precision):
            pred, mask = model(visible, noise, c.mask_ratio)
        if c.paste_visible:
            pred = torch.where(mask[:, :, None] > 0, pred.float(), model.patchify(visible))
        x = model.unpatchify(pred.float()) * mae.std + mae.mean
    return rearrange(x.clamp(0, 1) * 255, 'b c h w -> b h w c').round().byte()


# ---------------------------------------------------------------------------- the release

def release(row, folds, device):
    """Write one released data set."""
    cfg, c = row.cfg, row.cfg.reconstruct
    target, parts = row.folder / 'reconstructed', row.folder / 'reconstructed.parts'
    note = row.folder / 'release.json'          # stays in the run folder: it names the source
    maes = load_maes(row, folds, device)
    secret = release_secret(cfg)
    premises = premises_of(row, folds, secret)
    if (target / 'manifest.json').exists():
        check_release(target, premises, cfg)
        if runtime.rank() == 0:             # left by a kill between the last two lines of finish
            shutil.rmtree(parts, ignore_errors=True)
        return runtime.say(f'{target} is finished: nothing to do')
    if STRENGTH.get(c.method) == 'mask_ratio':
        visible_patches(cfg.data.size, cfg.mae.patch, c.mask_ratio)
    if c.method == 'blur' and math.ceil(3 * c.blur_sigma) >= cfg.data.size:
        raise InputError(f'reconstruct.blur_sigma = {c.blur_sigma:g} blurs over more than the '
                         f'{cfg.data.size} pixels of a face: give less than {cfg.data.size / 3:g}')
    fold, image, label = release_order(folds, secret, c.images_per_person)
    seed = secret_seed(secret, f'masks {cfg.run.seed}')
    whole = folds[0].private_data
    source = batches.Store(whole.images, range(len(whole.labels)), device)
    if runtime.rank() == 0:
        if not note.exists() or checkpoint.read_json(note) != premises:
            shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(note, premises)
    runtime.barrier()

    def make(number):
        """Released pixels of one part, batch by batch and each fold by its own model; or None."""
        chosen = slice(number * PART, (number + 1) * PART)
        out = torch.empty(len(image[chosen]), cfg.data.size, cfg.data.size, 3, dtype=torch.uint8)
        for k, mae in enumerate(maes):
            mine = np.flatnonzero(fold[chosen] == k)
            for places in (mine[i:i + c.batch] for i in range(0, len(mine), c.batch)):
                if stop.mine:
                    return None
                numbers = torch.from_numpy(image[chosen][places]).to(device)
                out[places] = protect(source(numbers), numbers, seed, cfg, mae).cpu()
        return out.permute(0, 3, 1, 2)

    def write(number, encoded):
        """One part whole or not at all: bytes of all images behind each other, and lengths."""
        encoded = [future.result() for future in encoded]
        temporary = parts / f'{number}.tmp'
        with open(temporary, 'wb') as f:
            np.savez(f, lengths=[len(e) for e in encoded],
                     bytes=np.frombuffer(b''.join(encoded), np.uint8))
        temporary.rename(parts / f'{number}.npz')

    total = math.ceil(len(image) / PART)
    todo = [n for n in range(runtime.rank(), total, runtime.world())
            if not (parts / f'{n}.npz').exists()]
    stage = f'reconstruct/{row.folder.relative_to(cfg.run.folder)}'.removesuffix('/.')
    log = runtime.Log(cfg.run.folder, stage, total, total - len(todo) * runtime.world())
    stop = runtime.Stop()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = None                                # the part that is still being encoded
        for done, number in enumerate(todo, 1):
            pixels = make(number)
            if pixels is None:
                break
            encoded = [pool.submit(records.encode, x, c.format, c.quality) for x in pixels]
            if waiting:
                write(*waiting)
            waiting = number, encoded
            log(min(total, total - (len(todo) - done) * runtime.world()),
                min(done * PART * runtime.world(), len(image)))
        if waiting:
            write(*waiting)
    stop.end()
    runtime.barrier()
    if runtime.rank() == 0:
        show(row, folds, maes, fold, image, seed, source)     # not behind what says all is done
        finish(row, parts, target, total, label, whole)
    runtime.barrier()
    runtime.say(f'released {len(image)} images of {label[-1] + 1} people: {target}')


def finish(row, parts, target, total, label, source):
    """Join the parts into insightface records; the folder appears with its manifest or not."""
    c, temporary = row.cfg.reconstruct, target.with_name('reconstructed.tmp')
    shutil.rmtree(temporary, ignore_errors=True)

    def encoded():
        for number in range(total):
            with np.load(parts / f'{number}.npz', allow_pickle=False) as part:
                content, ends = part['bytes'].tobytes(), np.cumsum(part['lengths'])
            for begin, end in zip([0, *ends], ends):
                yield content[begin:end]

    records.write_records(temporary, encoded(), label, row.cfg.data.size)
    key = STRENGTH.get(c.method)
    facts = {'method': c.method, **({key: getattr(c, key)} if key else {}),
             'paste_visible': c.paste_visible and c.method == 'facemae', 'images': len(label),
             'people': int(label[-1]) + 1, 'skipped': len(source.skipped),
             'size': row.cfg.data.size, 'format': c.format, 'quality': c.quality,
             'made_by': f'FaceMAE kit {runtime.provenance()["commit"]}'}
    (temporary / 'manifest.json').write_text(json.dumps(facts, indent=1) + '\n')
    (temporary / 'README.md').write_text(DATA_CARD.format(
        facts='\n'.join(f'- {k}: {v}' for k, v in facts.items())))
    shutil.rmtree(target, ignore_errors=True)
    os.sync()                           # a power cut shall not leave empty files behind a name
    temporary.rename(target)
    shutil.rmtree(parts)


DATA_CARD = """# Released face data set

{facts}

**What it is.** Each image was made from one photo of a real (or drawn) person by the method above
and is stored in insightface's record format. Labels were renumbered and the order was changed by
a secret that is not part of this release. Train on it as on any `train.rec`.

**What it does not promise.** The people are not anonymous. The images are meant to be harder to
re-identify; how hard, and for which attackers, is in the maker's results.json. A person's images
share one label, and their number is visible unless the maker capped it.

**Taking a person out.** The maker, who holds the secret, adds the person's original label to
`data.exclude`, makes the release again and replaces this one; models trained on it, too.
"""


def show(row, folds, maes, fold, image, seed, source):
    """Picture of originals, masked images and the release; it stays in the run folder."""
    cfg, places = row.cfg, np.flatnonzero(fold == fold[0])
    some = places[np.linspace(0, len(places) - 1, 8).astype(int)]
    numbers = torch.from_numpy(image[some]).to(source.device)
    originals = source(numbers)
    made = protect(originals, numbers, seed, cfg, maes[fold[0]])
    save_grid(with_masked(originals, numbers, seed, cfg, made),
              Path(cfg.run.folder) / 'figures' / f'{cfg.run.row or "release"}.png')


def with_masked(originals, numbers, seed, cfg, made):
    """Rows of a picture: originals, what a mask leaves, what was made; floats in 0..1."""
    x, made = (t.permute(0, 3, 1, 2).float() / 255 for t in (originals, made))
    if cfg.reconstruct.method != 'facemae':
        return [x, made]
    noise = batches.hashed(seed, 0, numbers, (x.shape[-1] // cfg.mae.patch) ** 2)
    return [x, masked(x, noise, cfg.reconstruct.mask_ratio, cfg.mae.patch), made]


def picture_of_photos(row, device):
    """Reconstruct the user's own photos into one picture; nothing is released."""
    cfg, folder = row.cfg, Path(row.cfg.reconstruct.photos)
    files = sorted(f for f in folder.glob('*') if f.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    if not files:
        raise InputError(f'reconstruct.photos = {folder} holds no .jpg or .png: name a folder '
                         'of face photos')
    mae = load_mae(row.mae((cfg.data.release_folds or [0])[0]), cfg.data.size, device,
                   runtime.again('train_mae.py'))
    images = torch.stack([torch.from_numpy(np.array(data.pixels(
        records.decode(records.open_bytes(f), f), f, cfg.data.size, 'resize')))
        for f in files[:64]]).to(device)
    data.warn_if_unaligned(images.cpu().numpy(), folder)
    numbers = torch.arange(len(images), device=device)
    made = protect(images, numbers, cfg.run.seed, cfg, mae)
    path = Path(cfg.run.folder) / 'figures' / 'photos.png'
    save_grid(with_masked(images, numbers, cfg.run.seed, cfg, made), path)
    runtime.say(f'{len(images)} photos, masked, reconstructed: {path}')


def main(cfg, device, compare):
    if cfg.reconstruct.photos:
        return picture_of_photos(next(rows(cfg, False)), device)
    folds = data.split(cfg)
    for row in rows(cfg, compare):
        release(row, folds, device)


if __name__ == '__main__':
    runtime.launch(main, __doc__, 'make the releases of all rows of compare')

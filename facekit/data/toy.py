"""Toy faces: a face data set for tests and the demo, drawn here, with no real person in it.

Who somebody is lies in many small measures (WHO); pose, light, expression, background and
occlusion (SHOT) change the pixels more. Lengths: half image widths, x to the right, y down.
"""
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from facekit.base.files import digest, replacing_folder
from facekit.data.bins import write_bin
from facekit.data.images import encode
from facekit.data.records import write_records
from facekit.data.sources import DRAWN

WHO = dict(  # name=(low, high) of a uniform draw
    head_w=(.5, .6), head_h=(.69, .8), jaw=(.05, .42), square=(0, .75), ear=(.05, .11),
    skin=(0, 1), eye_x=(.2, .28), eye_y=(-.1, 0), eye_w=(.1, .145), eye_h=(.05, .085),
    eye_tilt=(-.2, .25), iris=(.04, .06), iris_hue=(0, 1), brow_gap=(.11, .19), brow_w=(.11, .17),
    brow_t=(.01, .04), brow_tilt=(-.15, .3), brow_arch=(0, 4), nose_len=(.27, .43),
    nose_w=(.065, .13), nose_tall=(.36, .66), mouth_y=(.35, .44), mouth_w=(.15, .25),
    lip_up=(.02, .05), lip_low=(.03, .07), lip_red=(0, .6), style=(0, 6), hair_hue=(0, 1),
    hairline=(-.07, .06), part=(-1, 1), volume=(-.02, .05), strands=(5, 14), beard=(-1.8, 1.4),
    beard_w=(.2, .7), beard_y=(.12, .3), moustache=(-2.4, 1.8), mole_x=(-.4, .4), mole_y=(0, .6),
    glasses=(-1.8, 1), lens_w=(.12, .18), lens_h=(.08, .17), rim_hue=(0, 1))
SHOT = dict(
    yaw=(-.5, .5), nod=(-.1, .1), roll=(-.1, .1), scale=(.9, 1.1), shift_x=(-.07, .07),
    shift_y=(-.07, .07), light_x=(-1.1, 1.1), light_y=(-.8, .4), exposure=(.65, 1.25),
    warmth=(-.2, .2), contrast=(.55, 1.2), smile=(-.06, .16), gape=(-.07, .07), lids=(.4, 1.1),
    lift=(-.03, .05), gaze=(-.045, .045), frown=(-.15, .15), ground=(0, 1), ground2=(0, 1),
    ramp_x=(-.7, .7), ramp_y=(-.7, .7), cloth=(0, 1), collar=(.68, .95), hidden=(0, 12),
    veil=(0, 1), bar=(-.7, .7), blur=(-1, 1), noise=(.005, .045), grain=(0, 2**17))
SKIN = [[.97, .84, .75], [.93, .76, .64], [.86, .66, .52], [.76, .55, .42], [.58, .39, .28]]
HAIR = [[.09, .08, .08], [.20, .13, .10], [.38, .24, .15], [.74, .57, .34], [.66, .64, .62]]
IRIS = [[.22, .13, .08], [.36, .24, .13], [.38, .42, .24], [.33, .48, .62], [.50, .56, .60]]
CLOTH = [[.15, .17, .22], [.75, .72, .66], [.55, .20, .18], [.85, .80, .45], [.22, .38, .55]]
WHITE, BLACK, RED, ROSY, WARM = torch.tensor([
    [.93, .91, .89], [.06, .05, .05], [.72, .2, .24], [.9, .58, .57], [1, 0, -1]])[..., None, None]
STYLES = torch.tensor([  # volume, hairline, its curve and slope, ripple, half its length behind:
    [.00, -1.2, 0, 0, 0, -1], [.05, -.5, 1.2, .1, .01, -1],              # bald, short,
    [.08, -.3, .4, .1, .05, -1], [.08, -.52, 2.2, .7, .01, .12],         # fringe, side parting,
    [.09, -.5, 2.6, .1, .01, .6], [.15, -.44, 1.1, .1, .04, -1]])        # long, curls
SUPER = 2          # drawn at this many times the size, then averaged
POINTS = 2**17     # drawn at once by a thread: few enough to stay in the processor's cache


def _uniform(keys, ranges):
    """A generator per key (row of ints), so that the batch does not matter: .name (N, 1, 1, 1)."""
    low, high = np.array(list(ranges.values())).T
    draws = np.stack([np.random.default_rng(key).random(len(low)) for key in keys])
    columns = torch.from_numpy(low + draws * (high - low)).float().T.contiguous()
    return SimpleNamespace(**dict(zip(ranges, columns[..., None, None, None])))


def _colour(anchors, at):
    """Colour (N, 3, 1, 1) on the way from the first anchor, at (N, 1, 1, 1) = 0, to the last."""
    at, anchors = at.view(-1, 1) * (len(anchors) - 1), torch.tensor(anchors)
    low = at[:, 0].long().clamp(max=len(anchors) - 2)
    return torch.lerp(anchors[low], anchors[low + 1], at - low[:, None])[..., None, None]


def _cover(distance, edge=.02):
    """Share of each point that a shape covers, from its signed distance (negative inside)."""
    return distance.mul(-1 / edge).add_(.5).clamp_(0, 1)


def _oval(x, y, w, h):
    return ((x / w).square_() + (y / h).square_()).sqrt_().sub_(1).mul_(torch.min(w, h))


def _wave(t):
    """Ripple of period 1 between 0 and 1; unlike sine's, its last bit is the same in any batch."""
    return (t - t.floor()) * (t.ceil() - t) * 4


def _faces(who, shot, size):
    """Images (N, 3, size, size), float32, 0 to 1 or a little beyond."""
    grid = (torch.arange(size * SUPER) + .5) / (size * SUPER) * 2 - 1
    skin, hair = _colour(SKIN, who.skin), _colour(HAIR, who.hair_hue * (1 - .6 * who.skin))
    # Where each point lies on the upright figure, (x, y), and on its turned face, (fx, fy)
    x, y = (grid - shot.shift_x) / shot.scale, (grid[:, None] - shot.shift_y) / shot.scale
    x, y = x + y * shot.roll, y - x * shot.roll                           # (N, 1, H, W) each
    out, u, v = x.abs(), x / who.head_w, y / who.head_h
    fx = x * .95 - (1.21 - u.square()).clamp_(0).sqrt_() * who.head_w * shot.yaw
    fy = y - (1 - v.square()).clamp_(0).sqrt_() * shot.nod
    side, eye_v = fx.abs(), fy - who.eye_y
    light = shot.light_x * u / (.6 + u.abs()) + shot.light_y * v / (.6 + v.abs())
    # The head is an ellipse, narrower to the chin, its corners more or less square
    u, v = (u / (1 - who.jaw * v.clamp(0, 1).square_())).square_(), v.square()
    head = (u + v - who.square * u.clamp(max=1) * v.clamp(max=1)).sqrt_().sub_(1) * who.head_w
    volume, hairline, curve, slope, ripple, back = STYLES[who.style.long()].unbind(-1)
    curl = ripple * 2 * _wave((x + y) * 4) * _wave((x - y) * 4)
    hat, strand = head - volume - who.volume * (volume > 0) - curl, _wave(fx * who.strands + y)
    # From the back to the front: background, hair, neck, clothes, ears, head, beard
    rgb = _colour(CLOTH, shot.ground).repeat(1, 1, *x.shape[2:])
    rgb.lerp_(_colour(CLOTH, shot.ground2), _cover(shot.ramp_x * x + shot.ramp_y * y, 1))
    rgb.lerp_(hair * .6, _cover(torch.max(out - who.head_w - volume, (y - back).abs() - back)))
    rgb.lerp_(skin, _cover(torch.max(out - who.head_w * .6, -y)))
    rgb.lerp_(skin * .3, _cover(head - .12, .2) * _cover(-y) * .5)
    rgb.lerp_(_colour(CLOTH, shot.cloth), _cover(shot.collar - .3 * (out - .32).abs() - y))
    rgb.lerp_(skin * .92, _cover(_oval(out - who.head_w, y - .05, who.ear, who.ear * 1.7)))
    rgb.lerp_(skin, _cover(head))
    rgb.lerp_(skin * .3, _cover((fx - who.mole_x).square() + (fy - who.mole_y).square(), .001))
    chin = who.beard_y + .6 * (.25 - side).clamp_(0) - fy
    beard = torch.max(torch.max(chin, head), side - who.beard_w)
    rgb.lerp_(hair * (.75 + .2 * strand), _cover(beard, .06) * who.beard.clamp(0, .95))
    lip = _oval(fx, fy - who.mouth_y + .06, who.mouth_w, who.lip_up + .025)
    rgb.lerp_(hair * .8, _cover(lip, .04) * who.moustache.clamp(0, .95))
    # Mouth: two lips about a line that the smile bends, open or not
    across = (fx / (who.mouth_w * (1 + shot.smile))).square_()
    bulge, ends = (1 - across).clamp_(0), _cover(across - 1, .1)
    v, gape = fy - who.mouth_y - shot.smile * .4 * bulge, shot.gape.clamp(0) * bulge
    lips = torch.max(-v - gape - who.lip_up * bulge, v - gape - who.lip_low * bulge)
    rgb.lerp_(torch.lerp(skin * ROSY, RED, who.lip_red), _cover(lips) * ends)
    rgb.lerp_(RED * .3, _cover(v.abs() - gape - .007) * ends)
    rgb.lerp_(WHITE, _cover(torch.max(-v - gape, v + gape * .2) + .008) * ends)
    # Nose: it stands out of the face, so it turns further
    u, v, tall = fx - .16 * shot.yaw, eye_v - who.nose_len, who.nose_w * who.nose_tall
    rgb.lerp_(skin * .7, _cover(_oval(u, v + .15, tall, who.nose_len * .5), .1) * .5)
    rgb.lerp_(skin * .6, _cover(_oval(u, v - .02, who.nose_w * 1.05, tall)) * .7)
    rgb.lerp_(skin, _cover(_oval(u, v + .01, who.nose_w, tall)))
    rgb.lerp_(skin * .3, _cover(_oval(u.abs() - tall, v - tall * .7, tall * .5, tall * .3)))
    # Eyes and brows: u is 0 in the middle of an eye and grows outwards
    u, v = side - who.eye_x, eye_v + who.eye_tilt * (side - who.eye_x)
    almond = (1 - (u / who.eye_w).square_()).clamp_(0) * who.eye_h
    upper = v + almond * shot.lids
    eye = _cover(torch.max(-upper, v - almond * .7)) * _cover(u.abs() - who.eye_w)
    ball = ((u - fx.sign() * shot.gaze).square_() + v.square()).sqrt_()
    rgb.lerp_(WHITE, eye)
    rgb.lerp_(_colour(IRIS, who.iris_hue), eye * _cover(ball - who.iris))
    rgb.lerp_(BLACK, eye * _cover(ball - who.iris * .45))
    rgb.lerp_(skin * .15, _cover(upper.abs() - .012) * _cover(u.abs() - who.eye_w * 1.1))
    v = eye_v + who.brow_gap + shot.lift + (who.brow_tilt + shot.frown) * u
    brow = (v - who.brow_arch * u.square()).abs() - who.brow_t * (1 - .45 * u / who.brow_w)
    rgb.lerp_(hair * .7, _cover(brow, .03) * _cover(u.abs() - who.brow_w, .06) * .75)
    edge = hairline + who.hairline + curve * fx.square() + slope * who.part * fx
    rgb.lerp_(hair * (.85 + .2 * strand), _cover(torch.max(hat, fy - edge - ripple * strand)))
    # Glasses; one image of four has sunglasses (hidden is 0.x), a face mask (1.x) or a bar (2.x)
    hidden = shot.hidden.floor()
    lens = torch.max(_oval(u, eye_v, who.lens_w, who.lens_w), eye_v.abs() - who.lens_h)
    sides = torch.max((eye_v + .03).abs() - .014, torch.max(-lens, out - who.head_w))
    frame = _cover(torch.min(lens.abs() - .014, sides)) * ((who.glasses > 0) | (hidden == 0))
    rgb.lerp_(BLACK, _cover(lens) * (hidden == 0) * .93)
    rgb.lerp_(_colour(CLOTH, who.rim_hue) * .6, frame)
    mask = torch.max(head - .03, .2 - eye_v + .3 * fx.square())
    hider = _cover(mask) * (hidden == 1) + _cover((y - shot.bar).abs() - .1) * (hidden == 2)
    rgb.lerp_(_colour(CLOTH, shot.veil) * (.85 + .15 * _wave(y * 6 + x)), hider)
    # Light, as on a ball as wide as the head; then the camera
    rgb = torch.nn.functional.avg_pool2d(rgb.mul_((.9 + light).clamp_(.12)), SUPER)
    rgb = (rgb * shot.exposure * (1 + shot.warmth * WARM) - .45) * shot.contrast + .45
    soft = torch.nn.functional.avg_pool2d(rgb, 3, 1, 1, count_include_pad=False)
    return rgb.lerp_(soft, shot.blur.clamp(0))


def draw(identities, poses, size=64, seed=0):
    """Toy faces of identities (N,) in their images poses (N,), any ints from 0 on: uint8 RGB
    (N, 3, size, size). An image depends on seed, identity, pose and size, not on the others."""
    # + 1 as numpy pads keys with zeros: (seed, identity, 0) is the key of the identity itself
    keys = np.stack(np.broadcast_arrays(seed, identities, np.add(poses, 1)), 1)
    tape = np.random.default_rng((seed, 0, 0, 1)).standard_normal(2**17 + 3 * size * size)
    tape = torch.from_numpy(tape).unfold(0, 3 * size * size, 1).unflatten(1, (3, size, size))
    images = torch.empty(len(keys), 3, size, size, dtype=torch.uint8)

    def chunk(part):
        who, shot = _uniform(keys[part, :2], WHO), _uniform(keys[part], SHOT)
        rgb = _faces(who, shot, size) + tape[shot.grain.long().flatten()] * shot.noise
        images[part] = (rgb * 255 + .5).clamp_(0, 255).to(torch.uint8)

    # Own threads, as torch's would wait for each other after every short operation
    threads, step = torch.get_num_threads(), max(1, POINTS // (size * SUPER)**2)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(chunk, [slice(i, i + step) for i in range(0, len(keys), step)]))
    torch.set_num_threads(threads)
    return images


def draw_set(folder, identities, per_identity, test_identities, test_pairs, size, seed,
             quality=95):
    """Write per_identity images of each of the identities (train.rec, train.idx, property) and
    toy.bin, test_pairs pairs of the test_identities after them, into folder, which must be new:
    in each tenth the first half are two images of one person, the others of two people."""
    started = time.time()

    def files(people, poses):
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for i in range(0, len(people), 1024):    # in pieces, as a large set would fill memory
                images = draw(people[i:i + 1024], poses[i:i + 1024], size, seed)
                yield from pool.map(lambda image: encode(image, 'jpeg', quality), images)

    labels, poses = np.divmod(np.arange(identities * per_identity), per_identity)
    pairs, same = test_pairs_of(test_identities, test_pairs, seed)
    with replacing_folder(Path(folder)) as draft:
        write_records(draft, files(labels, poses), labels, size)
        needed, where = np.unique(pairs, axis=0, return_inverse=True)
        test = list(files(identities + needed[:, 0], needed[:, 1]))
        write_bin(draft / 'toy.bin', [test[i] for i in where.ravel()], same)
        (draft / DRAWN).write_text(digest((draft / 'train.rec').read_bytes()))
    print(f'{folder}: {len(labels)} toy faces drawn in {time.time() - started:.1f} s', flush=True)


def test_pairs_of(people, count, seed):
    """Person (0 .. people - 1) and pose (0 .. 7) of both images of each pair, int64
    (2 * count, 2), and which pairs are of one person, bool (count,)."""
    same = np.concatenate([fold - fold[:1] < len(fold) / 2
                           for fold in np.array_split(np.arange(count), 10)])
    rng, ends = np.random.default_rng((seed, 0, 0, 2)), (max(2, people), 8)
    # Person and pose of the first of each pair, and how many further on the second is
    first, step = (rng.integers(low, ends, size=(count, 2)) for low in (0, 1))
    step[same, 0] = 0
    return np.stack([first, (first + step) % ends], 1).reshape(-1, 2), same

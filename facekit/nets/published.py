"""Recognisers of other makers, which can only look: ONNX files, and dlib's.

They stand wherever a checkpoint of a judge or attacker is named, and need one more package each
(requirements-optional.txt). Like an IResNet they take float (B, 3, size, size) in -1..1, RGB, and
give embeddings float32 (B, d).
"""
import contextlib
import importlib.util
import os
import threading
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from facekit.base import files
from facekit.base.errors import InputError, counted, optional

DLIB = 'dlib'                                  # what stands for the path of dlib's recogniser
# Where its 150-pixel chips lie in an aligned face of 112 pixels: left, top, right, bottom; below
# the face the edge is repeated. Of CFP's 7,000 frontal pairs it then tells 99.1 % (AUC 0.9991).
CHIP, CHIP_BOX = 150, (6.4, 20.1, 106.8, 120.5)
LOAD_SECONDS = 120                             # in which an ONNX file is loaded
SECONDS = 30                                   # in which it embeds an image
MOST_PIXELS = 1 << 28                          # of all images that it wants at once
DLIB_AT_ONCE = 32                              # chips; more take more memory and no less time


def is_published(path):
    """Whether a path names a recogniser of this module."""
    return str(path) == DLIB or str(path).lower().endswith('.onnx')


def published(path, pixels):
    """The recogniser at `path`, an .onnx file or 'dlib'; `pixels`: see evaluate.onnx_pixels."""
    return DlibRecogniser() if str(path) == DLIB else OnnxRecogniser(path, pixels)


def runtime(path):
    """The module that runs the published recogniser at `path`; InputError if it is missing."""
    if str(path) != DLIB:
        return optional('onnxruntime', 'onnxruntime')
    dlib_weights()
    return optional('dlib', 'dlib-bin')


def dlib_weights():
    """Path of the weights of dlib's recogniser; InputError if they are not installed."""
    package = importlib.util.find_spec('face_recognition_models')
    if not package:
        raise InputError('the weights of dlib\'s recogniser are not installed: run `pip '
                         'install face-recognition-models`')
    return Path(package.origin).parent / 'models' / 'dlib_face_recognition_resnet_model_v1.dat'


def check_installed(cfg):
    """InputError if what runs a published recogniser that a config names is not installed."""
    versions([cfg.judge.checkpoint, cfg.evaluate.model, *cfg.evaluate.attacks])


def versions(paths):
    """{module: version} of what runs the published recognisers among `paths`."""
    modules = {runtime(path) for path in paths if is_published(path)}
    return dict(sorted((module.__name__, module.__version__) for module in modules))


def refuse_published(path, wanted):
    """Refuse a recogniser of this module where `wanted` asks for its gradient."""
    if is_published(path):
        raise InputError(f'{wanted}, but {path} can only embed and gives no gradient: name an '
                         'IResNet')


class OnnxRecogniser(torch.nn.Module):
    """An ONNX file as insightface's model packs ship them (w600k_r50.onnx)."""

    def __init__(self, path, pixels):
        super().__init__()
        onnxruntime = runtime(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
        content = bytes(files.open_bytes(path))      # a file could name other files to read
        # Each process has a GPU of its own; without its number all would take the first
        gpu = {'device_id': os.environ.get('LOCAL_RANK', '0')}
        providers = [(name, gpu) if name == 'CUDAExecutionProvider' else name
                     for name in onnxruntime.get_available_providers()]
        self.session, self.run_options, self.path = None, onnxruntime.RunOptions, path

        def load():
            with contextlib.suppress(Exception):      # the runtime raises of many kinds
                self.session = onnxruntime.InferenceSession(content, options, providers)

        # It computes all that does not depend on images, for as long as a file likes
        loader = threading.Thread(target=load, daemon=True)
        loader.start()
        loader.join(LOAD_SECONDS)
        if loader.is_alive():
            raise InputError(f'{path} is not loaded within {LOAD_SECONDS} s: export it again, or '
                             'name another recogniser')
        try:
            face, = self.session.get_inputs()
            self.input, (self.batch, channels, self.size, width) = face.name, face.shape
            good = (channels, width) == (3, self.size) and face.type == 'tensor(float)'
            at_once = self.batch if isinstance(self.batch, int) else 1
            good = good and 0 < at_once * self.size ** 2 < MOST_PIXELS and self.size > 0
        except Exception:                      # see above
            good = False
        if not good:
            raise InputError(f'{path} is no ONNX recogniser that takes float32 images (B, 3, S, '
                             'S): export it with a fixed image size and its weights inside')
        self.pixels = pixels
        self.try_out()

    def try_out(self):
        """Refuse a file that cannot embed two images of noise; a blank image would be divided by
        its own contrast where a net does so."""
        noise = torch.rand(2, 3, self.size, self.size, generator=torch.Generator()) * 2 - 1
        if not self(noise).isfinite().all():
            raise InputError(f'{self.path} gives no finite numbers for images of noise: export it '
                             'again, or name another recogniser')

    def forward(self, x):
        """x float (B, 3, size, size) in -1..1 -> embeddings float32 (B, d)."""
        images = x.float().cpu()
        images = (images + 1) * 127.5 if self.pixels == 'bytes' else images
        size = self.batch if isinstance(self.batch, int) else len(images)
        out = []
        for part in images.split(size):
            filled = F.pad(part, (0, 0, 0, 0, 0, 0, 0, size - len(part)))
            z = np.asarray(self.run(filled.contiguous().numpy()))
            if z.dtype.kind != 'f' or z.ndim != 2 or len(z) != size or z.shape[1] < 2:
                raise InputError(f'{self.path} gives an output of shape {z.shape} and type '
                                 f'{z.dtype}, not one embedding an image: name a recogniser')
            out.append(torch.from_numpy(z)[:len(part)].float())
        return torch.cat(out).to(x.device)

    def run(self, images):
        """What the net makes of images as it takes them, numpy (B, 3, size, size); InputError
        where it fails or takes longer than SECONDS an image."""
        options, seconds = self.run_options(), SECONDS * len(images)
        timer = threading.Timer(seconds, setattr, (options, 'terminate', True))
        timer.start()
        try:
            output, *_ = self.session.run(None, {self.input: images}, options)
        except Exception as error:             # see above
            reason = f'does not end within {seconds} s'
            if timer.is_alive():
                reason = f'fails ({" ".join(str(error).split())[:150]})'
            raise InputError(f'{self.path} {reason} when it embeds '
                             f'{counted(len(images), "image")}: export it again, or name another '
                             'recogniser') from None
        finally:
            timer.cancel()
        return output


class DlibRecogniser(torch.nn.Module):
    """dlib's recogniser: 128 numbers, 99.38 % on LFW by its author, who put it into the public
    domain; about 40 ms a face on one CPU core."""
    size = 112

    def __init__(self):
        super().__init__()
        self.net = runtime(DLIB).face_recognition_model_v1(str(dlib_weights()))

    def chips(self, x):
        """uint8 (B, 150, 150, 3) of faces float (B, 3, H, W) in -1..1, aligned as ArcFace's."""
        left, top, right, bottom = (2 * edge / 112 - 1 for edge in CHIP_BOX)
        theta = torch.tensor([[(right - left) / 2, 0, (right + left) / 2],
                              [0, (bottom - top) / 2, (bottom + top) / 2]])
        grid = F.affine_grid(theta.expand(len(x), 2, 3), (len(x), 3, CHIP, CHIP),
                             align_corners=False)
        x = F.grid_sample(x.float().cpu(), grid, padding_mode='border', align_corners=False)
        return ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()

    def forward(self, x):
        """x float (B, 3, H, W) in -1..1 -> embeddings float32 (B, 128)."""
        out = []
        with torch.autocast('cpu', enabled=False):              # bf16 would shift the crop
            chips = self.chips(x)
        for part in chips.split(DLIB_AT_ONCE):
            out += self.net.compute_face_descriptor(list(part.numpy()), 0)
        return torch.tensor([list(z) for z in out], device=x.device)

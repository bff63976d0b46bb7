"""Other people's code that bench.py measures beside the kit, as its authors run it; none is here.

`compare` imports it from clones: FOLDER/mae (facebookresearch/mae), FOLDER/insightface, and from
what is installed: timm (for mae), transformers, mxnet. Whatever is missing is named and left out.
"""
import contextlib
import functools
import itertools
import math
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import embed
import models
import runtime
from bench import Timer, drawn, quiet, repeated
from irm import irm_loss

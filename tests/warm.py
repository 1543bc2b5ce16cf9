"What the server of forks.py imports before it forks. Its objects are frozen: no child's garbage collector touches, and so copies, them"
import gc
import importlib
from pathlib import Path

import accelerate  # noqa: F401
import diffusers  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import pandas  # noqa: F401
import peft  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import srnb

for room in sorted(Path(srnb.__file__).parent.glob("[a-z]*.py")): importlib.import_module(f"srnb.{room.stem}")
gc.collect()
gc.freeze()

"""What the server of forks.py imports before it forks. Its objects are frozen: the garbage collector of a child does
not touch them, and so does not copy them"""
import gc
import importlib
from pathlib import Path

import srnb

HEAVY = ("accelerate", "diffusers", "execnb.shell", "nbdev.test", "pandas", "peft", "pyarrow.parquet", "pyiqa",
         "pytest", "seaborn", "stlpips_pytorch", "torch.utils.tensorboard")
ROOMS = [f"srnb.{o.stem}" for o in sorted(Path(srnb.__file__).parent.glob("[a-z]*.py"))]
for name in (*HEAVY, *ROOMS): importlib.import_module(name)
gc.collect()
gc.freeze()

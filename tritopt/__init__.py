"""Triton fused optimizers for mixed-precision training: MXNet 2.0's optimizer API on PyTorch tensors."""

from tritopt import lr_scheduler as lr_scheduler
from tritopt import optimizers as optimizers
from tritopt.module import ModuleParameters as ModuleParameters
from tritopt.module import module_parameters as module_parameters
from tritopt.optimizer import Optimizer as Optimizer
from tritopt.optimizers import LAMB as LAMB
from tritopt.optimizers import NAG as NAG
from tritopt.optimizers import SGD as SGD
from tritopt.optimizers import Adam as Adam
from tritopt.optimizers import AdamW as AdamW
from tritopt.optimizers import Test as Test
from tritopt.phases import Apply as Apply
from tritopt.registry import create as create
from tritopt.registry import names as names
from tritopt.registry import register as register
from tritopt.updater import Updater as Updater
from tritopt.updater import get_updater as get_updater

__version__ = "0.1.0"

"""Triton fused optimizers for mixed-precision training: MXNet 2.0's optimizer API on PyTorch tensors."""

from tritopt import lr_scheduler as lr_scheduler
from tritopt import optim as optim
from tritopt import optimizers as optimizers
from tritopt.engine.driver import Apply as Apply
from tritopt.mxnet.module import ModuleParameters as ModuleParameters
from tritopt.mxnet.module import module_parameters as module_parameters
from tritopt.mxnet.optimizer import Optimizer as Optimizer
from tritopt.mxnet.optimizer import register as register
from tritopt.mxnet.registry import create as create
from tritopt.mxnet.registry import names as names
from tritopt.mxnet.updater import Updater as Updater
from tritopt.mxnet.updater import get_updater as get_updater
from tritopt.optim.clip import clip_grad_norm_ as clip_grad_norm_
from tritopt.optimizers import DCASGD as DCASGD
from tritopt.optimizers import FTML as FTML
from tritopt.optimizers import LAMB as LAMB
from tritopt.optimizers import LANS as LANS
from tritopt.optimizers import LARS as LARS
from tritopt.optimizers import NAG as NAG
from tritopt.optimizers import SGD as SGD
from tritopt.optimizers import SGLD as SGLD
from tritopt.optimizers import AdaBelief as AdaBelief
from tritopt.optimizers import AdaDelta as AdaDelta
from tritopt.optimizers import Adafactor as Adafactor
from tritopt.optimizers import AdaGrad as AdaGrad
from tritopt.optimizers import Adam as Adam
from tritopt.optimizers import Adamax as Adamax
from tritopt.optimizers import AdamW as AdamW
from tritopt.optimizers import Adan as Adan
from tritopt.optimizers import Ftrl as Ftrl
from tritopt.optimizers import GroupAdaGrad as GroupAdaGrad
from tritopt.optimizers import Lion as Lion
from tritopt.optimizers import Nadam as Nadam
from tritopt.optimizers import RAdam as RAdam
from tritopt.optimizers import RMSProp as RMSProp
from tritopt.optimizers import Signum as Signum
from tritopt.optimizers import Test as Test

__version__ = "0.1.0"

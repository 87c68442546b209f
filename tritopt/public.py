"""The names that `tritopt` has, which takes them from here when it is first asked for one."""

import tritopt.gluon as gluon  # noqa: F401 (`from tritopt` would ask this module)
import tritopt.lr_scheduler as lr_scheduler  # noqa: F401
import tritopt.optim as optim  # noqa: F401
import tritopt.optimizer as optimizer  # noqa: F401
import tritopt.optimizers as optimizers  # noqa: F401
from tritopt.engine.driver import Apply as Apply
from tritopt.gluon.loss_scaler import LossScaler as LossScaler
from tritopt.gluon.trainer import Trainer as Trainer
from tritopt.gluon.utils import clip_global_norm as clip_global_norm
from tritopt.mxnet.module import ModuleParameters as ModuleParameters
from tritopt.mxnet.module import module_parameters as module_parameters
from tritopt.mxnet.optimizer import Optimizer as Optimizer
from tritopt.mxnet.optimizer import register as register
from tritopt.mxnet.registry import create as create
from tritopt.mxnet.registry import names as names
from tritopt.mxnet.updater import Updater as Updater
from tritopt.mxnet.updater import get_updater as get_updater
from tritopt.optim.clip import clip_grad_norm_ as clip_grad_norm_
from tritopt.optimizers import *  # noqa: F403 (listed there, once)

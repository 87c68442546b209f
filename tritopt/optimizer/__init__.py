"""Names of `mxnet.optimizer`: a script that says `mx.optimizer.SGD` finds it here after `import tritopt as mx`."""

from tritopt.mxnet.optimizer import Optimizer as Optimizer
from tritopt.mxnet.optimizer import register as register
from tritopt.mxnet.registry import create as create
from tritopt.mxnet.updater import Updater as Updater
from tritopt.mxnet.updater import get_updater as get_updater
from tritopt.optimizer import contrib as contrib
from tritopt.optimizers import *  # noqa: F403 (listed there, once)

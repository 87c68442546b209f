"""Names of `mxnet.optimizer.contrib`."""

from tritopt.optimizers.groupadagrad import GroupAdaGrad as GroupAdaGrad

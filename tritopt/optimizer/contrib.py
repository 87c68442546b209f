"""Names of `mxnet.optimizer.contrib` that scripts look for there."""

from tritopt.optimizers.groupadagrad import GroupAdaGrad as GroupAdaGrad

"""Gluon's Trainer, loss scale and clip: names of `mxnet.gluon` that a training loop uses."""

from tritopt.gluon import utils as utils
from tritopt.gluon.loss_scaler import LossScaler as LossScaler
from tritopt.gluon.trainer import Trainer as Trainer

"""tritopt.optim: import optimizers from here instead of from torch.optim; nothing else changes."""

from tritopt.optim.adam import Adam as Adam
from tritopt.optim.adam import AdamW as AdamW
from tritopt.optim.optimizer import Optimizer as Optimizer
from tritopt.optim.optimizer import Options as Options

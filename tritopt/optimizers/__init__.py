"""One optimizer a file; importing this package registers them all."""

from tritopt.optimizers.adam import Adam as Adam
from tritopt.optimizers.adamw import AdamW as AdamW
from tritopt.optimizers.lamb import LAMB as LAMB
from tritopt.optimizers.nag import NAG as NAG
from tritopt.optimizers.sgd import SGD as SGD
from tritopt.optimizers.test import Test as Test

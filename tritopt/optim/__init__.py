"""tritopt.optim: import optimizers from here instead of from torch.optim; nothing else changes."""

from tritopt.optim.adabelief import AdaBelief as AdaBelief
from tritopt.optim.adadelta import Adadelta as Adadelta
from tritopt.optim.adafactor import Adafactor as Adafactor
from tritopt.optim.adagrad import Adagrad as Adagrad
from tritopt.optim.adam import Adam as Adam
from tritopt.optim.adam import AdamW as AdamW
from tritopt.optim.adamax import Adamax as Adamax
from tritopt.optim.adan import Adan as Adan
from tritopt.optim.dcasgd import DCASGD as DCASGD
from tritopt.optim.ftml import FTML as FTML
from tritopt.optim.ftrl import Ftrl as Ftrl
from tritopt.optim.groupadagrad import GroupAdaGrad as GroupAdaGrad
from tritopt.optim.lamb import LAMB as LAMB
from tritopt.optim.lans import LANS as LANS
from tritopt.optim.lars import LARS as LARS
from tritopt.optim.lion import Lion as Lion
from tritopt.optim.nadam import NAdam as NAdam
from tritopt.optim.nag import NAG as NAG
from tritopt.optim.optimizer import Optimizer as Optimizer
from tritopt.optim.optimizer import Options as Options
from tritopt.optim.radam import RAdam as RAdam
from tritopt.optim.rmsprop import RMSprop as RMSprop
from tritopt.optim.sgd import SGD as SGD
from tritopt.optim.sgld import SGLD as SGLD
from tritopt.optim.signum import Signum as Signum

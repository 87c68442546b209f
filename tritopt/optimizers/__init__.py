"""One optimizer a file; importing this package registers them all, and tritopt has each under its name."""

from typing import TYPE_CHECKING

from tritopt.optimizers.adabelief import AdaBelief as AdaBelief
from tritopt.optimizers.adadelta import AdaDelta as AdaDelta
from tritopt.optimizers.adafactor import Adafactor as Adafactor
from tritopt.optimizers.adagrad import AdaGrad as AdaGrad
from tritopt.optimizers.adam import Adam as Adam
from tritopt.optimizers.adamax import Adamax as Adamax
from tritopt.optimizers.adamw import AdamW as AdamW
from tritopt.optimizers.adan import Adan as Adan
from tritopt.optimizers.ademamix import AdEMAMix as AdEMAMix
from tritopt.optimizers.dcasgd import DCASGD as DCASGD
from tritopt.optimizers.ftml import FTML as FTML
from tritopt.optimizers.ftrl import Ftrl as Ftrl
from tritopt.optimizers.groupadagrad import GroupAdaGrad as GroupAdaGrad
from tritopt.optimizers.lamb import LAMB as LAMB
from tritopt.optimizers.lans import LANS as LANS
from tritopt.optimizers.lars import LARS as LARS
from tritopt.optimizers.lion import Lion as Lion
from tritopt.optimizers.muon import Muon as Muon
from tritopt.optimizers.nadam import Nadam as Nadam
from tritopt.optimizers.nag import NAG as NAG
from tritopt.optimizers.radam import RAdam as RAdam
from tritopt.optimizers.rmsprop import RMSProp as RMSProp
from tritopt.optimizers.sgd import SGD as SGD
from tritopt.optimizers.sgld import SGLD as SGLD
from tritopt.optimizers.signum import Signum as Signum
from tritopt.optimizers.test import Test as Test

if not TYPE_CHECKING:  # a checker reads the imports above, and no list that is made at run time
    __all__ = [name for name, value in list(globals().items()) if isinstance(value, type)]

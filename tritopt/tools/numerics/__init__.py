"""Cost and loss of storage formats: `tritopt numerics`.

Every format trains on two problems, and so does a float64 truth. The digits are a real network, in a closed loop: its
gradients are those of its own weights. The stress is synthetic: gradients that do not depend on the weights, the same
for all formats and exact in each of them, so that what differs is what was stored. One optimizer has all its cases.
"""

from tritopt.tools.numerics.digits import Digits as Digits
from tritopt.tools.numerics.muon_digits import MUON_STEPS as MUON_STEPS
from tritopt.tools.numerics.muon_digits import muon_digits as muon_digits
from tritopt.tools.numerics.orthogonality import orthogonality as orthogonality
from tritopt.tools.numerics.record import FormatResult as FormatResult
from tritopt.tools.numerics.record import load as load
from tritopt.tools.numerics.report import COLUMNS as COLUMNS
from tritopt.tools.numerics.report import DIGITS_LR as DIGITS_LR
from tritopt.tools.numerics.report import EXPLANATION as EXPLANATION
from tritopt.tools.numerics.report import STEPS as STEPS
from tritopt.tools.numerics.report import Report as Report
from tritopt.tools.numerics.report import summary as summary
from tritopt.tools.optimizers import find_optimizer as find_optimizer
from tritopt.tools.storage import FORMATS as FORMATS
from tritopt.tools.storage import StorageFormat as StorageFormat
from tritopt.tools.storage import find_formats as find_formats

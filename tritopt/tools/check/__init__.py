"""Check optimizers on this machine: fused against reference, both against a float64 truth.

Every step starts all of them from the same tensors, so an error is that of one step. It is compared with what rounding
can do and with the distance that the step moved: weights barely move, so any formula is close to the old weight.
"""

from tritopt.tools.check.cases import Case as Case
from tritopt.tools.check.cases import CheckResult as CheckResult
from tritopt.tools.check.cases import find_cases as find_cases
from tritopt.tools.check.run import check_case as check_case
from tritopt.tools.check.run import run_checks as run_checks
from tritopt.tools.environment import device as device
from tritopt.tools.environment import environment as environment
from tritopt.tools.optimizers import find_optimizers as find_optimizers
from tritopt.tools.optimizers import load_optimizer as load_optimizer
from tritopt.tools.optimizers import registered as registered

"""Compiled code of a step, without a GPU, and the time that it takes at least: `tritopt inspect`.

Processes of their own compile, in which kernels are not interpreted whatever TRITON_INTERPRET says here.
"""

from tritopt.tools.inspect.cases import GRAD_DTYPES as GRAD_DTYPES
from tritopt.tools.inspect.compile import inspect_case as inspect_case
from tritopt.tools.inspect.compile import inspect_cases as inspect_cases
from tritopt.tools.inspect.diff import Change as Change
from tritopt.tools.inspect.diff import compare as compare
from tritopt.tools.inspect.peer_kernels import Skipped as Skipped
from tritopt.tools.inspect.peer_kernels import inspect_peers as inspect_peers
from tritopt.tools.inspect.peers import PEERS as PEERS
from tritopt.tools.inspect.peers import PeerKernel as PeerKernel
from tritopt.tools.inspect.record import Case as Case
from tritopt.tools.inspect.record import LaunchRecord as LaunchRecord
from tritopt.tools.inspect.record import Step as Step
from tritopt.tools.inspect.record import dump as dump
from tritopt.tools.inspect.record import load as load
from tritopt.tools.inspect.record import steps_of as steps_of
from tritopt.tools.inspect.record import widths as widths
from tritopt.tools.inspect.select import MAIN_FORMATS as MAIN_FORMATS
from tritopt.tools.inspect.select import Selection as Selection
from tritopt.tools.inspect.select import in_both as in_both
from tritopt.tools.inspect.select import select_cases as select_cases

"""Storage formats, a family in each file: kernels and their PyTorch twins side by side."""

from tritopt.kernels.formats.format import PLAIN as PLAIN
from tritopt.kernels.formats.format import Format as Format
from tritopt.kernels.formats.scales import BLOCK as BLOCK
from tritopt.kernels.formats.scales import scales_shape as scales_shape
from tritopt.kernels.formats.states import SIGNED as SIGNED
from tritopt.kernels.formats.states import SQUARES as SQUARES
from tritopt.kernels.formats.states import STATE_FORMATS as STATE_FORMATS
from tritopt.kernels.formats.weights import KAHAN as KAHAN
from tritopt.kernels.formats.weights import MASTER_FP32 as MASTER_FP32
from tritopt.kernels.formats.weights import MASTERS as MASTERS
from tritopt.kernels.formats.weights import SPLIT8 as SPLIT8
from tritopt.kernels.formats.weights import SPLIT16 as SPLIT16
from tritopt.kernels.formats.weights import STOCHASTIC as STOCHASTIC
from tritopt.kernels.formats.weights import format_of as format_of

"""A machine that runs on the CPU the PTX which Triton compiles for NVIDIA GPUs, thread by thread, on CPU tensors.

Triton's interpreter runs a kernel's Python. The machine runs its compiled code: layouts, vectorised accesses,
predicates, shuffles, shared memory, barriers, rounding and NaN as the PTX ISA has them. `driver.switch_on` puts it in
the place of a GPU. What comes after PTX is not in it: ptxas, timing, caches, memory order between programs, CUDA.

Approximate instructions (sqrt.approx, ex2.approx ...) give the exact result, rounded, unless `Record.inexact` puts
them one ulp off. Atomics, asynchronous copies, tensor cores, local memory, calls and clusters are refused by name when
a kernel is loaded.
"""

"""Measure on a CUDA card what this course can only plan on a CPU, and store it.

    make gpu-report                                  # all parts
    python -m benchmarks.gpu a paging                # some, by letter or by name
    python -m benchmarks.gpu --dry-run               # all of it, tiny, on a CPU; stores nothing

a  quantiser  packed bytes, constants and read-back values beside bitsandbytes' CUDA kernels; and
              bandwidth, as a share of what the card reaches when it copies
b  steps      a 7B: full, LoRA and QLoRA steps, peak memory beside the plan, tokens per second
c  paging     the optimizer step of a 7B's adapters, paged by nobody, by the driver and by us
d  headline   QLoRA steps of a 65B within 48 GB, of a 33B within 24 GB and of a 7B within 8 GB
e  study      ways of chapter 8 at ten seeds; takes its learning rates from `make experiments`

Estimates for an H100, not measurements: a 1 minute, b 4, c 3, d 7, e 6. Each part is stopped after
`--minutes` (8). Each of its tasks has a process of its own: what crashes takes nothing with it, and
the memory of one is not counted for the next. A part is stored as data/results/gpu_<part>.json, and
holds what was measured and, under "error", what failed; the exit code is then 1.

The models of parts b and d have RANDOM WEIGHTS: time and memory are real, what they say is noise.

Results stored before this was a package name the command `python benchmarks/gpu_report.py`.
"""

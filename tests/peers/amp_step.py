"""Times PyTorch's GradScaler, clip_grad_norm_ and AdamW(fused=True) on f32 parameters, beside a copy.

    python3 tests/peers/amp_step.py 1e6 1e7 1e8

`cargo bench --bench amp_step` measures the same step of this crate: as many tensors, the same copy (32 bytes of traffic
for each parameter).
"""

import argparse
import statistics
import time

import torch

TENSORS, ROUNDS = 20, 15


def trainer(count):
    parameters = [torch.nn.Parameter(torch.full((count // TENSORS,), 0.5)) for _ in range(TENSORS)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.25)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))

    def step():
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


def milliseconds(work):
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("counts", nargs="+", type=float, metavar="PARAMETERS")
for count in map(int, parser.parse_args().counts):
    source = torch.ones(2 * count, dtype=torch.float64)
    target = torch.zeros_like(source)
    step = trainer(count)
    step()
    copies, steps = [], []
    for _ in range(ROUNDS):
        copies.append(milliseconds(lambda: target.copy_(source)))
        steps.append(milliseconds(step))
    for what, times in (("copy", copies), ("step", steps)):
        print(f"{count} parameters, {what}: least {min(times):.3f} ms, median {statistics.median(times):.3f} ms")

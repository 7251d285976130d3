"""Times PyTorch's GradScaler, clip_grad_norm_ and AdamW(fused=True) on f32 parameters, beside a copy.

    python3 tests/peers/amp_step.py 1e6 1e7 1e8
    python3 tests/peers/amp_step.py 1e8 --beside target/release/deps/amp_step-0123456789abcdef

`cargo bench --bench amp_step` measures the same step of this crate: as many tensors, the same copy (32 bytes of traffic
for each parameter). Its executable, which `cargo bench --bench amp_step --no-run` names, takes turns with PyTorch when
it is given with `--beside`: both keep their memory, and each step of one follows on a step of the other, so that what
else the machine does meets both.
"""

import argparse
import statistics
import subprocess
import time

import torch

TENSORS, ROUNDS = 20, 31
# Threads that wait for work by spinning have gone to sleep by then.
PAUSE_S = 0.05


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


class Beside:
    """The bench of this crate, which makes a step when it is told to."""

    names = "ours", "ours, checked when summed"

    def __init__(self, program, count):
        command = [program, "--bench", "--in-turn", str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self):
        print(file=self.process.stdin, flush=True)
        return [float(word) for word in self.process.stdout.readline().split()]


def measure(count, program):
    beside = Beside(program, count) if program else None
    source = torch.ones(2 * count, dtype=torch.float64)
    target = torch.zeros_like(source)
    step = trainer(count)
    rounds = []
    for _ in range(ROUNDS + 1):
        if not beside:
            rounds.append([milliseconds(lambda: target.copy_(source)), milliseconds(step)])
            continue
        ours = beside.step()
        time.sleep(PAUSE_S)
        rounds.append([milliseconds(step), *ours])
        time.sleep(PAUSE_S)
    names = ["step", *Beside.names] if beside else ["copy", "step"]
    columns = list(zip(*rounds[1:]))
    medians = [statistics.median(times) for times in columns]
    for name, times, median in zip(names, columns, medians):
        figures = f"least {min(times):.3f} ms, median {median:.3f} ms, most {max(times):.3f} ms"
        print(f"{count} parameters, {name}: {figures}" + f", {median / medians[0]:.2f} of PyTorch's" * (name in Beside.names))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("counts", nargs="+", type=float, metavar="PARAMETERS")
parser.add_argument("--beside", metavar="PROGRAM", help="the executable of this crate's bench, to take turns with")
arguments = parser.parse_args()
for count in map(int, arguments.counts):
    measure(count, arguments.beside)

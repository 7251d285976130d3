"""Random steps of a scaler, clipping and Adam or AdamW, with and without amsgrad, in this crate and in PyTorch on the CPU, compared bit by bit.

    cargo build --release --example amp_cases
    python3 tests/peers/differential.py [--cases 10000] [--seed 1]

needs a PyTorch (2.9 or later) and NumPy. Each case draws types, sizes, settings and gradients: of all magnitudes,
zeros, subnormal, powers of two, now and then infinite or NaN. Before each step PyTorch is given the state that this
crate had, so that every step is compared by itself. A distance is the number of floating-point values between two
results; of sums, which may cancel, it is counted in spacings of the largest number involved.

What must agree to the bit: the overflow flag, scale, growth tracker and step counts; gradients, unscaled and clipped
(PyTorch is given the norm in f64, rounded once to the gradients' type, which is how this crate takes it; below
limits of 0.1 it divides without its epsilon); what a skipped step leaves. What may
be off: weights from equal moments by one, by PyTorch's operations but for the root; moments by one, as its kernels
contract a product with a sum (the first by two for a beta1 below 0.5, where PyTorch interpolates from the other
end). A gradient to which PyTorch's kernels add decay by a contracted product may cancel, which the moments take up:
those are compared for information. So are weights with all these taken together: a moment that cancels carries what it
is off by into the weight, and PyTorch's root is not rounded to nearest on every processor.
"""

import argparse
import collections
import json
import math
import pathlib
import random
import struct
import subprocess
import sys

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
TYPES = {"f16": (torch.float16, np.uint16), "bf16": (torch.bfloat16, np.uint16),
         "f32": (torch.float32, np.uint32), "f64": (torch.float64, np.uint64)}
SIGNED = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}

# How far a result may be from PyTorch's; 0 if not named.
LIMITS = {"first moments": 1, "first moments, beta1 below 0.5": 2, "second moments": 1, "weights from equal moments": 1,
          "weights, all taken together": math.inf, "moments, decay in the gradient": math.inf}


def to_bits(tensor):
    """The elements' bits, as a list of integers."""
    unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[tensor.element_size()]
    return tensor.contiguous().view(SIGNED[tensor.dtype]).numpy().view(unsigned).tolist()


def from_bits(bits, dtype):
    kind, unsigned = TYPES[dtype]
    signed = {np.uint16: np.int16, np.uint32: np.int32, np.uint64: np.int64}[unsigned]
    return torch.from_numpy(np.array(bits, dtype=unsigned).view(signed).copy()).view(kind)


def ordered(tensor):
    """Integers in the order of the values: neighbours differ by one, both zeros are 0."""
    bits = tensor.view(SIGNED[tensor.dtype]).to(torch.int64)
    if tensor.dtype == torch.float64:
        return [value if value >= 0 else -(value & (2**63 - 1)) for value in bits.tolist()]
    width = tensor.element_size() * 8
    return [value if value >= 0 else -(value & (2 ** (width - 1) - 1)) for value in bits.tolist()]


def distances(ours, theirs):
    """How many values lie between, element by element; infinite if only one is a NaN."""
    result = []
    for a, b, x, y in zip(ordered(ours), ordered(theirs), ours.tolist(), theirs.tolist()):
        if math.isnan(x) or math.isnan(y):
            result.append(0 if math.isnan(x) and math.isnan(y) else math.inf)
        else:
            result.append(abs(a - b))
    return result


def relative(before, ours, theirs):
    """The distances of two results of adding to `before`, in spacings of the largest number involved: where the
    sum cancels, what the terms were rounded by is many spacings of the result."""
    largest = torch.maximum(torch.maximum(before.abs(), ours.abs()), (ours - before).abs())
    largest = torch.clamp(largest, max=torch.finfo(largest.dtype).max / 2)
    spacing = torch.nextafter(largest, torch.full_like(largest, math.inf)) - largest
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    distance = torch.where(same, torch.zeros_like(ours), (ours - theirs).abs() / spacing)
    return [math.ceil(value) if math.isfinite(value) else math.inf for value in distance.tolist()]


# Drawing cases.

def numbers(draw, count, dtype, spoil):
    kind = TYPES[dtype][0]
    low, high = {"f16": (-6, 3), "bf16": (-20, 12), "f32": (-20, 12), "f64": (-30, 30)}[dtype]
    values = []
    style = draw.choice(["plain", "plain", "wide", "powers"])
    base = 10 ** draw.uniform(low, high)
    for _ in range(count):
        pick = draw.random()
        if pick < 0.05:
            values.append(draw.choice([0.0, -0.0]))
        elif pick < 0.08:
            values.append(draw.choice([-1, 1]) * float(torch.finfo(kind).tiny) * draw.random())
        elif style == "powers":
            values.append(draw.choice([-1, 1]) * 2.0 ** draw.randint(-12, 12))
        elif style == "wide":
            values.append(draw.gauss(0, 1) * 10 ** draw.uniform(low, high))
        else:
            values.append(draw.gauss(0, 1) * base)
    if spoil:
        for _ in range(draw.randint(1, 3)):
            values[draw.randrange(count)] = draw.choice([math.inf, -math.inf, math.nan])
    return torch.tensor(values, dtype=torch.float64).to(kind)


def draw_case(draw):
    weight_dtype, grad_dtype = draw.choice([("f32", "f32")] * 6 + [("f64", "f64"), ("f32", "bf16"), ("f32", "f16")])
    sizes = [draw.choice([1, 2, 7, 8, 33, 64, draw.randint(1, 300)]) for _ in range(draw.randint(1, 5))]
    powers = draw.random() < 0.5
    scale = 2.0 ** draw.randint(-8, 24) if powers else draw.uniform(0.1, 1e5)
    return {
        "weight_dtype": weight_dtype,
        "grad_dtype": grad_dtype,
        "powers": powers,
        # Gradients of 16 bits are unscaled in place by PyTorch's kernel alone: its optimizers take none.
        "in_place": grad_dtype != weight_dtype or draw.random() < 0.6,
        "max_norm": None if draw.random() < 0.3 or grad_dtype != weight_dtype else 10 ** draw.uniform(-4, 4),
        "scaler": {
            "init_scale": float(np.float32(scale)),
            "growth_factor": 2.0 if powers else draw.uniform(1.01, 4),
            "backoff_factor": 0.5 if powers else draw.uniform(0.05, 0.95),
            "growth_interval": draw.randint(1, 3),
        },
        "decoupled": draw.random() < 0.5,
        "amsgrad": draw.random() < 0.4,
        "adam": {
            "learning_rate": draw.choice([1e-3, 3e-4, 0.1, 10 ** draw.uniform(-6, 0)]),
            "betas": draw.choice([(0.9, 0.999), (0.9, 0.95), (draw.random() * 0.99, draw.uniform(0.5, 0.9999))]),
            "epsilon": draw.choice([1e-8, 1e-6, 10 ** draw.uniform(-12, -3)]),
            "weight_decay": draw.choice([0.0, 0.01, 0.1, draw.random()]),
        },
        "weights": [to_bits(numbers(draw, size, weight_dtype, False)) for size in sizes],
        "steps": [
            [to_bits(numbers(draw, size, grad_dtype, draw.random() < 0.06)) for size in sizes]
            for _ in range(draw.randint(1, 4))
        ],
    }


def bits_of(number):
    return struct.unpack("<Q", struct.pack("<d", number))[0]


def for_program(case):
    """The case as this crate's side reads it."""
    numbers = dict(case["adam"])
    numbers["beta1"], numbers["beta2"] = numbers.pop("betas")
    scaler = dict(case["scaler"])
    interval = scaler.pop("growth_interval")
    kept = ("weight_dtype", "grad_dtype", "in_place", "decoupled", "amsgrad", "weights", "steps")
    return {
        **{key: case[key] for key in kept},
        "growth_interval": interval,
        "max_norm": None if case["max_norm"] is None else bits_of(case["max_norm"]),
        "adam": {key: bits_of(value) for key, value in numbers.items()},
        "scaler": {key: bits_of(value) for key, value in scaler.items()},
    }


# PyTorch's side.

class Peer:
    """A scaler and an optimizer of PyTorch that go on from any state."""

    def __init__(self, case):
        self.case = case
        settings, scaler = case["adam"], case["scaler"]
        self.dtype = case["weight_dtype"]
        self.parameters = [torch.nn.Parameter(from_bits(bits, self.dtype)) for bits in case["weights"]]
        optimizer = torch.optim.AdamW if case["decoupled"] else torch.optim.Adam
        self.optimizer = optimizer(
            self.parameters, amsgrad=case["amsgrad"], lr=settings["learning_rate"], betas=tuple(settings["betas"]), eps=settings["epsilon"],
            weight_decay=settings["weight_decay"], foreach=False, fused=False)
        self.scaler = torch.amp.GradScaler("cpu", **scaler)
        self.scaler.scale(torch.ones(()))
        self.overflowed_by_dividing = False

    def go_on_from(self, state):
        """Takes over weights, moments, counts and scale as this crate left them."""
        for index, parameter in enumerate(self.parameters):
            parameter.data.copy_(from_bits(state["weights"][index], self.dtype))
            if state["steps"][index] == 0:
                self.optimizer.state.pop(parameter, None)
                continue
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state["steps"][index])),
                "exp_avg": from_bits(state["first"][index], self.dtype),
                "exp_avg_sq": from_bits(state["second"][index], self.dtype),
            }
            if self.case["amsgrad"]:
                self.optimizer.state[parameter]["max_exp_avg_sq"] = from_bits(state["largest"][index], self.dtype)
        self.scaler._scale.fill_(state["scale"])
        self.scaler._growth_tracker.fill_(state["tracker"])

    def step(self, gradients, given):
        """One step, whose norm was `given`. Gives the flag, gradients as they were left, and the total norm in f64."""
        halves = self.case["grad_dtype"] != self.dtype
        grads = [from_bits(bits, self.case["grad_dtype"]) for bits in gradients]
        if halves:
            # The check and the division as the scaler's kernel does them, then the update on wide copies.
            found, inverse = torch.zeros(()), self.scaler._scale.double().reciprocal().float()
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inverse)
            self.scaler._per_optimizer_states[id(self.optimizer)]["found_inf_per_device"] = {torch.device("cpu"): found}
            self.scaler._per_optimizer_states[id(self.optimizer)]["stage"] = torch.amp.grad_scaler.OptState.UNSCALED
            self.overflowed_by_dividing = any(bool(grad.isinf().any()) for grad in grads)
            for parameter, grad in zip(self.parameters, grads):
                parameter.grad = grad.to(parameter.dtype)
        else:
            for parameter, grad in zip(self.parameters, grads):
                parameter.grad = grad
            self.scaler.unscale_(self.optimizer)
        norm = None
        if self.case["max_norm"] is not None:
            norm = math.sqrt(sum(float((grad.double() ** 2).sum()) for grad in grads))
            narrow = torch.tensor(norm, dtype=torch.float64).to(TYPES["f32"][0])
            if math.isfinite(narrow):
                # The last bits of a norm in f64 depend on the order of its sum, so it is this crate's.
                self.clip(narrow if self.dtype == "f32" else torch.tensor(given, dtype=torch.float64))
        found = self.scaler._per_optimizer_states[id(self.optimizer)]["found_inf_per_device"]
        flag = any(float(value) != 0 for value in found.values())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return flag, norm

    def clip(self, norm):
        """Clips by a norm of the gradients' type: as PyTorch does from a limit of 0.1 on, without its epsilon below."""
        limit = self.case["max_norm"]
        if limit >= 0.1:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm, foreach=False)
            return
        factor = (limit / norm.double()).clamp(max=1.0).to(norm.dtype)
        for parameter in self.parameters:
            parameter.grad.mul_(factor)

    def moved(self, weights, first, second, count):
        """The last lines of PyTorch's Adam and AdamW, in its operations, from given moments. NumPy's root is rounded once."""
        settings = self.case["adam"]
        beta1, beta2 = settings["betas"]
        if self.case["decoupled"]:
            weights = weights * (1 - settings["learning_rate"] * settings["weight_decay"])
        root = torch.from_numpy(np.sqrt(second.numpy()))
        denominator = (root / (1 - beta2**count) ** 0.5).add_(settings["epsilon"])
        return weights.addcdiv_(first, denominator, value=-settings["learning_rate"] / (1 - beta1**count))


class Tally:
    def __init__(self):
        self.counts = collections.defaultdict(collections.Counter)
        self.failures = []
        self.known = 0

    def note(self, what, distance, where):
        shown = distance if distance <= 8 else "more"
        self.counts[what][shown] += 1
        if distance > LIMITS.get(what, 0):
            self.failures.append((what, distance, where))


def compare(case, number, left, tally):
    peer = Peer(case)
    before = None
    first_name = "first moments" if case["adam"]["betas"][0] >= 0.5 else "first moments, beta1 below 0.5"
    for index, (state, gradients) in enumerate(zip(left, case["steps"])):
        where = f"case {number} step {index + 1}"
        if before is not None:
            peer.go_on_from(before)
        old = [parameter.detach().clone() for parameter in peer.parameters]
        old_first = [from_bits(before["first"][i], case["weight_dtype"]) if before else torch.zeros_like(old[i])
                     for i in range(len(old))]
        old_largest = [from_bits(before["largest"][i], case["weight_dtype"]) if before and case["amsgrad"]
                       else torch.zeros_like(old[i]) for i in range(len(old))]
        given = None if state["norm"] is None else np.array([state["norm"]], dtype=np.uint64).view(np.float64)[0]
        flag, norm = peer.step(gradients, given)
        if state["found_inf"] and not flag and peer.overflowed_by_dividing:
            # The one known difference: PyTorch looks at gradients before it divides them.
            tally.known += 1
            before = state
            continue
        exact = [("flag", flag, state["found_inf"]), ("scale", float(peer.scaler._scale), state["scale"]),
                 ("tracker", int(peer.scaler._growth_tracker), state["tracker"])]
        for what, theirs, ours in exact:
            tally.note(what, 0 if theirs == ours else math.inf, where)
        if norm is not None and state["norm"] is not None:
            same = (math.isnan(norm) and math.isnan(given)) or given == norm or abs(given - norm) <= 1e-13 * abs(norm)
            tally.note("norm in f64, to 1e-13", 0 if same else math.inf, where)
        for i, parameter in enumerate(peer.parameters):
            if case["in_place"] and not flag:
                # A gradient that was unscaled and clipped in place; narrow ones are compared as they were written.
                ours = from_bits(state["gradients"][i], case["grad_dtype"])
                theirs = parameter.grad.to(ours.dtype)
                kind = "gradients, scale a power of two" if case["powers"] else "gradients, any scale"
                for distance in distances(ours, theirs):
                    tally.note(kind, distance, where)
            moments = peer.optimizer.state.get(parameter, {})
            count = int(moments["step"]) if moments else 0
            tally.note("step counts", 0 if count == state["steps"][i] else math.inf, where)
            weights = from_bits(state["weights"][i], case["weight_dtype"])
            if flag:
                tally.note("weights of skipped steps", max(distances(weights, parameter.detach())), where)
                continue
            first, second = (from_bits(state[name][i], case["weight_dtype"]) for name in ("first", "second"))
            divisor = from_bits(state["largest"][i], case["weight_dtype"]) if case["amsgrad"] else second
            has_decay = not case["decoupled"] and case["adam"]["weight_decay"] != 0
            decayed = "moments, decay in the gradient" if has_decay else None
            if case["amsgrad"]:
                for distance in distances(divisor, torch.maximum(old_largest[i], second)):
                    tally.note("largest second moments from equal second ones", distance, where)
            for what, results in (
                ("weights, all taken together", relative(old[i], weights, parameter.detach())),
                ("weights from equal moments", relative(old[i], weights, peer.moved(old[i], first, divisor, count))),
                (decayed or first_name, relative(old_first[i], first, moments["exp_avg"])),
                (decayed or "second moments", distances(second, moments["exp_avg_sq"])),
            ):
                for distance in results:
                    tally.note(what, distance, where)
        before = state


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--program", default=str(ROOT / "target/release/examples/amp_cases"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    cases = [draw_case(draw) for _ in range(options.cases)]
    lines = "".join(json.dumps(for_program(case)) + "\n" for case in cases)
    output = subprocess.run([options.program], input=lines, capture_output=True, text=True, check=True).stdout
    results = [json.loads(line) for line in output.splitlines()]
    assert len(results) == len(cases), f"{len(results)} results of {len(cases)} cases"
    tally = Tally()
    for number, (case, left) in enumerate(zip(cases, results)):
        compare(case, number, left, tally)
    print(f"PyTorch {torch.__version__}, {len(cases)} cases, {sum(len(case['steps']) for case in cases)} steps, seed {options.seed}")
    for what, counts in sorted(tally.counts.items()):
        print(f"  {what}: " + ", ".join(f"{count} off by {distance}" for distance, count in sorted(counts.items(), key=str)))
    print(f"  steps that only this crate skipped, as dividing by a scale below 1 made f16 infinite: {tally.known}")
    for what, distance, where in tally.failures[:20]:
        print(f"FAILED {where}: {what} off by {distance}")
    sys.exit(1 if tally.failures else 0)


main()

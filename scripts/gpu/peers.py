"""The work of benches/gpu on allocators and optimizers of Python's world, one JSON object a line.

    peers.py LABEL PEER PART... [TRACE.at...]

PEER: `torch` (tensors, from Python), `torch-native` (the C++ entry points of PyTorch's allocator), `cupy` (its memory
pool). PART: `pairs`, `runs`, `steps`; the last is PyTorch's alone. LABEL names the peer in the output: settings of
PyTorch's allocator come from the environment.
"""

import array
import ctypes
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings

from program import ALLOCATE, FREE, Program

SIZES = (("512B", 512), ("64KiB", 64 << 10), ("4MiB", 4 << 20))
# As in benches/gpu: what keeps the device busy while a step is enqueued.
RUNWAY_TURNS, RUNWAY_BYTES = 16, 2 << 30
# Names, width and layers, as in benches/gpu/steps.rs.
NETWORKS = (("1e8", 1024, 8), ("1e9", 2048, 20))
WARM_UP, REPEATS_MIN, REPEATS_MAX, SECONDS = 3, 5, 30, 1.5


def tell(part, name, **figures):
    print(json.dumps({"part": part, "name": name, **figures}), flush=True)


def repeat(once):
    """The rules of benches/gpu/clock.rs."""
    for _ in range(WARM_UP):
        once()
    results, start = [], time.perf_counter()
    while len(results) < REPEATS_MAX and (len(results) < REPEATS_MIN or time.perf_counter() - start < SECONDS):
        results.append(once())
    return results


class Torch:
    """Tensors of bytes."""

    def __init__(self):
        import torch

        self.torch = torch
        self.streams = []
        torch.empty(1, device="cuda")

    def free_bytes(self):
        return self.torch.cuda.mem_get_info()[0]

    def pair(self, bytes_, count):
        empty, uint8 = self.torch.empty, self.torch.uint8
        start = time.perf_counter_ns()
        for _ in range(count):
            empty(bytes_, dtype=uint8, device="cuda")
        return (time.perf_counter_ns() - start) / count

    def play(self, program):
        torch, live, now = self.torch, [None] * program.slots, None
        while len(self.streams) < program.streams:
            self.streams.append(torch.cuda.Stream())
        start = time.perf_counter_ns()
        for kind, slot, bytes_, stream in program.operations:
            if kind == ALLOCATE:
                if stream != now:
                    now = stream
                    torch.cuda.set_stream(self.streams[now])
                live[slot] = torch.empty(bytes_, dtype=torch.uint8, device="cuda")
            elif kind == FREE:
                live[slot] = None
            else:
                live[slot].record_stream(self.streams[stream])
        return time.perf_counter_ns() - start


class TorchNative(Torch):
    """PyTorch's allocator through its C++ entry points, compiled here."""

    def __init__(self):
        super().__init__()
        self.library = ctypes.CDLL(str(self.compile()))
        self.library.player_pairs.restype = ctypes.c_double
        self.library.player_pairs.argtypes = [ctypes.c_int64, ctypes.c_int64]
        self.library.player_play.restype = ctypes.c_double
        self.library.player_play.argtypes = [ctypes.c_void_p] + 3 * [ctypes.c_int64]

    def compile(self):
        torch = pathlib.Path(self.torch.__file__).parent
        packages = pathlib.Path(sysconfig.get_paths()["purelib"])
        homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", shutil.which("nvcc")]
        headers = [pathlib.Path(home).resolve() / "include" for home in homes[:2] if home]
        headers += [pathlib.Path(homes[2]).resolve().parents[1] / "include"] if homes[2] else []
        headers += packages.glob("nvidia/*/include")
        cuda = [path for path in headers if (path / "cuda_runtime_api.h").exists() and (path / "crt").exists()]
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if not cuda or not compiler:
            sys.exit("no C++ compiler" if cuda else "no headers of the CUDA runtime")
        library = pathlib.Path(tempfile.mkdtemp()) / "player.so"
        command = [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-w", f"-I{torch / 'include'}", f"-I{cuda[0]}"]
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(self.torch._C._GLIBCXX_USE_CXX11_ABI)}"]
        command += [str(pathlib.Path(__file__).with_name("torch_player.cpp")), "-o", str(library)]
        command += [f"-L{torch / 'lib'}", "-lc10_cuda", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
        subprocess.run(command, check=True)
        return library

    def pair(self, bytes_, count):
        return self.library.player_pairs(bytes_, count)

    def play(self, program):
        flat = array.array("q", [number for operation in program.operations for number in operation])
        address, count = flat.buffer_info()
        took = self.library.player_play(address, count // 4, program.slots, program.streams)
        if took < 0:
            raise MemoryError("PyTorch's allocator has no room")
        return took


class Cupy:
    """A pool of its own; uses on other streams cannot be told to it."""

    def __init__(self):
        import cupy

        self.cupy, self.pool, self.streams = cupy, cupy.cuda.MemoryPool(), []
        self.pool.malloc(512)

    def free_bytes(self):
        return self.cupy.cuda.runtime.memGetInfo()[0]

    def pair(self, bytes_, count):
        malloc = self.pool.malloc
        start = time.perf_counter_ns()
        for _ in range(count):
            malloc(bytes_)
        return (time.perf_counter_ns() - start) / count

    def play(self, program):
        malloc, live, now = self.pool.malloc, [None] * program.slots, None
        while len(self.streams) < program.streams:
            self.streams.append(self.cupy.cuda.Stream(non_blocking=True))
        start = time.perf_counter_ns()
        for kind, slot, bytes_, stream in program.operations:
            if kind == ALLOCATE:
                if stream != now:
                    now = stream
                    self.streams[now].use()
                live[slot] = malloc(bytes_)
            elif kind == FREE:
                live[slot] = None
        return time.perf_counter_ns() - start


def pairs(label, peer):
    for name, bytes_ in SIZES:
        tell("pairs", f"{label}/{name}", ns=statistics.median(repeat(lambda: peer.pair(bytes_, 20_000))))


def runs(label, peer, traces):
    for path in traces:
        program = Program(path)
        name = f"{label}/{pathlib.Path(path).stem}"
        free = peer.free_bytes()
        try:
            cold = peer.play(program) / 1e6
            held = free - peer.free_bytes()
            times = repeat(lambda: peer.play(program) / max(program.allocations, 1))
        except Exception as error:  # Out of memory has another type in each library.
            tell("runs", name, failed=str(error).splitlines()[0])
            continue
        figures = dict(ns=statistics.median(times), cold_ms=cold, allocations=program.allocations)
        peak = program.peak_bytes
        tell("runs", name, **figures, peak_requested_bytes=peak, held_bytes=held, ratio=held / max(peak, 1))
        if hasattr(peer, "torch"):
            peer.torch.cuda.empty_cache()
        else:
            peer.pool.free_all_blocks()


def shapes(width, layers):
    """As in benches/gpu/steps.rs."""
    layer = [
        (3 * width, width),
        (3 * width, 1),
        (width, width),
        (width, 1),
        (4 * width, width),
        (4 * width, 1),
        (width, 4 * width),
        (width, 1),
        (width, 1),
        (width, 1),
    ]
    return layer * layers


class Trainer:
    """GradScaler, clipping and AdamW of PyTorch on tensors of the given shapes."""

    def __init__(self, torch, sizes, way):
        self.torch = torch
        self.parameters = [torch.nn.Parameter(torch.full(size, 0.02, device="cuda")) for size in sizes]
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, 1e-4)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, weight_decay=0.01, **{way: True})
        # The gradients stay from step to step, so they must not be scaled down.
        self.scaler = torch.amp.GradScaler("cuda", init_scale=1.0, growth_interval=2**31 - 1)
        self.scaler.scale(torch.ones((), device="cuda"))
        self.runway = torch.empty(RUNWAY_BYTES, dtype=torch.uint8, device="cuda")

    def step(self):
        self.scaler.unscale_(self.optimizer)
        self.torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def device_time(self):
        """Microseconds of the device, which is busy until the host has enqueued the step."""
        events = [self.torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for _ in range(RUNWAY_TURNS):
            self.runway.zero_()
        events[0].record()
        self.step()
        events[1].record()
        self.torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) * 1e3

    def host_time(self):
        """Microseconds of the host, whose device has nothing else to do."""
        start = time.perf_counter_ns()
        self.step()
        host = (time.perf_counter_ns() - start) / 1e3
        self.torch.cuda.synchronize()
        return host

    def synchronisations(self):
        """Times that one step makes the host wait, by PyTorch's own count."""
        self.torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.step()
        self.torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)


def steps(label, peer):
    torch = peer.torch
    for way in ("fused", "foreach"):
        for name, width, layers in NETWORKS:
            sizes = shapes(width, layers)
            elements = sum(rows * columns for rows, columns in sizes)
            # Weights, gradients, moments, and what the foreach path keeps meanwhile.
            if peer.free_bytes() < 28 * elements:
                tell("steps", f"{label}-{way}/{name}", passed_over="too little free memory")
                continue
            trainer = Trainer(torch, sizes, way)
            device, host = (statistics.median(repeat(once)) for once in (trainer.device_time, trainer.host_time))
            waits = trainer.synchronisations()
            tell("steps", f"{label}-{way}/{name}", us=device, host_us=host, elements=elements, host_synchronisations=waits)
            del trainer
            torch.cuda.empty_cache()


def main():
    label, kind, *words = sys.argv[1:]
    peer = {"torch": Torch, "torch-native": TorchNative, "cupy": Cupy}[kind]()
    if "pairs" in words:
        pairs(label, peer)
    if "steps" in words:
        steps(label, peer)
    if "runs" in words:
        runs(label, peer, [word for word in words if word.endswith(".at")])


if __name__ == "__main__":
    main()

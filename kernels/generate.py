"""Makes kernels/ptx/ from kernels/*.cu with a pinned NVRTC.

    python3 kernels/generate.py            write the files
    python3 kernels/generate.py --check    fail if they differ from what the sources give
    python3 kernels/generate.py --ptxas    also assemble them for every architecture from sm_80 to sm_120
    python3 kernels/generate.py --install  install the compilers and nothing else

The compilers come from packages that pip installs into target/kernels/ on first use; no CUDA toolkit, driver
or GPU is needed. The version of NVRTC decides the version of PTX, and that the oldest driver that can load
it: 12.0 gives PTX 8.0, which drivers from 525 on take. The sources are handed over as text under fixed names,
so the same sources give the same bytes on every machine.
"""

import argparse
import ctypes
import pathlib
import re
import subprocess
import sys

KERNELS = pathlib.Path(__file__).resolve().parent
TOOLS = KERNELS.parent / "target" / "kernels"
ARCHITECTURES = ("compute_80", "compute_90")
# Contracted products and sums would differ from the twins, which round each. Lambdas carry no `__device__`.
OPTIONS = ("--std=c++17", "--fmad=false", "-default-device")

NVRTC = ("nvidia-cuda-nvrtc-cu12", "12.0.140")
PTXAS = ("nvidia-cuda-nvcc-cu12", "12.8.93")
ASSEMBLED_FOR = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def installed(package, pattern):
    """The file matching `pattern` of a pinned package, installed into TOOLS if it is not there."""
    name, version = package
    folder = TOOLS / f"{name}-{version}"
    if not any(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--root-user-action=ignore", "--target", str(folder)]
        subprocess.run([*command, f"{name}=={version}"], check=True)
    return next(folder.glob(pattern))


def nvrtc_library():
    return installed(NVRTC, "nvidia/cuda_nvrtc/lib/libnvrtc.so.*")


def ptxas_program():
    return installed(PTXAS, "nvidia/cuda_nvcc/bin/ptxas")


class Nvrtc:
    def __init__(self):
        self.library = ctypes.CDLL(str(nvrtc_library()))

    def text(self, program, what):
        size = ctypes.c_size_t()
        getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.library, f"nvrtcGet{what}")(program, buffer)
        return buffer.value

    def compile(self, source, headers, architecture):
        """The PTX of `source`, which may include `headers`, a dictionary from names to texts."""
        def strings(values):
            return (ctypes.c_char_p * len(values))(*[value.encode() for value in values])

        program = ctypes.c_void_p()
        names, texts = strings(headers.keys()), strings(headers.values())
        self.library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kitsune.cu", len(headers), texts, names
        )
        options = strings((f"--gpu-architecture={architecture}", *OPTIONS))
        failed = self.library.nvrtcCompileProgram(program, len(options), options)
        log = self.text(program, "ProgramLog").decode().strip()
        if failed or log:
            sys.exit(f"{architecture}:\n{log}")
        return self.text(program, "PTX")


def generate():
    """The PTX of one module with all kernels, for each architecture."""
    sources = sorted(KERNELS.glob("*.cu"))
    headers = {path.name: path.read_text() for path in [*sources, *sorted(KERNELS.glob("*.cuh"))]}
    module = "".join(f'#include "{path.name}"\n' for path in sources)
    nvrtc = Nvrtc()
    return {name: nvrtc.compile(module, headers, name) for name in ARCHITECTURES}


def path_of(architecture):
    return KERNELS / "ptx" / f"kitsune.{architecture}.ptx"


def check(modules):
    differing = [name for name, ptx in modules.items() if path_of(name).read_bytes() != ptx]
    if differing:
        sys.exit(f"{', '.join(differing)}: not what the sources give; run python3 kernels/generate.py")


def assemble():
    ptxas = ptxas_program()
    ptxas.chmod(0o755)
    for source in ARCHITECTURES:
        for target in ASSEMBLED_FOR:
            if int(target[3:]) >= int(source[8:]):
                output = TOOLS / f"kitsune.{target}.cubin"
                command = [ptxas, f"--gpu-name={target}", path_of(source), "--output-file", output]
                subprocess.run(command, check=True)
                print(f"{source} assembles for {target}: {output.stat().st_size} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--ptxas", action="store_true", help="assemble the files")
    parser.add_argument("--install", action="store_true", help="install the compilers and nothing else")
    options = parser.parse_args()
    if options.install:
        nvrtc_library()
        ptxas_program()
        return
    modules = generate()
    if options.check:
        check(modules)
    for name, ptx in modules.items():
        if not options.check:
            path_of(name).write_bytes(ptx)
        entries = len(re.findall(rb"\.visible \.entry", ptx))
        version = re.search(rb"\.version (\S+)", ptx)[1].decode()
        print(f"{name}: {entries} entries, {len(ptx)} bytes, PTX {version}")
    if options.ptxas:
        assemble()


main()

"""Makes kernels/ptx/ from kernels/*.cu with a pinned NVRTC.

    python3 kernels/generate.py            write the file
    python3 kernels/generate.py --check    fail if it differs from what the sources give
    python3 kernels/generate.py --ptxas    also assemble it for every architecture from sm_80 to sm_120
    python3 kernels/generate.py --install  install the compilers and nothing else

The compilers come from packages that pip installs into target/kernels/ on first use; no CUDA toolkit, driver
or GPU is needed. The version of NVRTC decides the version of PTX, and that the oldest driver that can load
it: 12.0 gives PTX 8.0, which drivers from 525 on take. It is made for sm_80 alone: for sm_90 the compiler writes the
same instructions, and what a device runs is compiled from them for that device. The sources are handed over as text
under fixed names, so the same sources give the same bytes on every machine.
"""

import argparse
import ctypes
import pathlib
import re
import subprocess
import sys

KERNELS = pathlib.Path(__file__).resolve().parent
TOOLS = KERNELS.parent / "target" / "kernels"
ARCHITECTURE = "compute_80"
MODULE = KERNELS / "ptx" / f"kitsune.{ARCHITECTURE}.ptx"
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

    def compile(self, source, headers):
        """The PTX of `source`, which may include `headers`, a dictionary from names to texts."""
        def strings(values):
            return (ctypes.c_char_p * len(values))(*[value.encode() for value in values])

        program = ctypes.c_void_p()
        names, texts = strings(headers.keys()), strings(headers.values())
        self.library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kitsune.cu", len(headers), texts, names
        )
        options = strings((f"--gpu-architecture={ARCHITECTURE}", *OPTIONS))
        failed = self.library.nvrtcCompileProgram(program, len(options), options)
        log = self.text(program, "ProgramLog").decode().strip()
        if failed or log:
            sys.exit(log)
        return self.text(program, "PTX")


def generate():
    """The PTX of one module with all kernels."""
    sources = sorted(KERNELS.glob("*.cu"))
    headers = {path.name: path.read_text() for path in [*sources, *sorted(KERNELS.glob("*.cuh"))]}
    module = "".join(f'#include "{path.name}"\n' for path in sources)
    return Nvrtc().compile(module, headers)


def check(ptx):
    if MODULE.read_bytes() != ptx:
        sys.exit(f"{MODULE.name}: not what the sources give; run python3 kernels/generate.py")


def assemble():
    ptxas = ptxas_program()
    ptxas.chmod(0o755)
    for target in ASSEMBLED_FOR:
        output = TOOLS / f"kitsune.{target}.cubin"
        subprocess.run([ptxas, f"--gpu-name={target}", MODULE, "--output-file", output], check=True)
        print(f"assembles for {target}: {output.stat().st_size} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--ptxas", action="store_true", help="assemble the file")
    parser.add_argument("--install", action="store_true", help="install the compilers and nothing else")
    options = parser.parse_args()
    if options.install:
        nvrtc_library()
        ptxas_program()
        return
    ptx = generate()
    if options.check:
        check(ptx)
    else:
        MODULE.write_bytes(ptx)
    entries = len(re.findall(rb"\.visible \.entry", ptx))
    version = re.search(rb"\.version (\S+)", ptx)[1].decode()
    print(f"{MODULE.name}: {entries} entries, {len(ptx)} bytes, PTX {version}")
    if options.ptxas:
        assemble()


main()

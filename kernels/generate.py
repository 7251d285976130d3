"""Makes kernels/ptx/ from kernels/*.cu with a pinned NVRTC: a module for each source, and the list of them.

    python3 kernels/generate.py            write the files
    python3 kernels/generate.py --check    fail if they differ from what the sources give
    python3 kernels/generate.py --ptxas    also assemble them for every architecture from sm_80 to sm_120
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
import resource
import subprocess
import sys

KERNELS = pathlib.Path(__file__).resolve().parent
TOOLS = KERNELS.parent / "target" / "kernels"
ARCHITECTURE = "compute_80"
MODULES = KERNELS / "ptx"
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
    """The files of MODULES by name: the PTX of each source, and the list of modules."""
    sources = sorted(KERNELS.glob("*.cu"))
    headers = {path.name: path.read_text() for path in [*sources, *sorted(KERNELS.glob("*.cuh"))]}
    nvrtc = Nvrtc()
    files = {f"{path.stem}.ptx": nvrtc.compile(f'#include "{path.name}"\n', headers) for path in sources}
    files["modules.rs"] = listed(files).encode()
    return files


def entries(ptx):
    return sorted(re.findall(r"\.visible \.entry (\w+)", ptx.decode()))


def listed(files):
    """The modules as Rust text, which kernels/src/lib.rs includes."""
    lines = ["[\n"]
    for name, ptx in files.items():
        lines += ["    Module {\n", f'        name: "{name.removesuffix(".ptx")}",\n']
        lines += [f'        text: concat!(include_str!("{name}"), "\\0"),\n', "        entries: &[\n"]
        lines += [f'            "{entry}",\n' for entry in entries(ptx)]
        lines += ["        ],\n", "    },\n"]
    return "".join([*lines, "]\n"])


def present():
    """The files that are in MODULES, by name."""
    return {path.name: path.read_bytes() for path in MODULES.iterdir()}


def check(files):
    there = present()
    differ = sorted(name for name in files.keys() | there.keys() if files.get(name) != there.get(name))
    if differ:
        sys.exit(f"{', '.join(differ)}: not what the sources give; run python3 kernels/generate.py")


def write(files):
    MODULES.mkdir(exist_ok=True)
    for name in present().keys() - files.keys():
        (MODULES / name).unlink()
    for name, text in files.items():
        (MODULES / name).write_bytes(text)


def assemble():
    ptxas = ptxas_program()
    ptxas.chmod(0o755)
    for target in ASSEMBLED_FOR:
        total, dearest = 0, (0.0, "")
        for module in sorted(MODULES.glob("*.ptx")):
            output = TOOLS / f"{module.stem}.{target}.cubin"
            began = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([ptxas, f"--gpu-name={target}", module, "--output-file", output], check=True)
            ended = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
            dearest = max(dearest, (seconds, module.stem))
            total += output.stat().st_size
        print(f"assembles for {target}: {total} bytes; dearest module: {dearest[1]}, {dearest[0]:.1f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--ptxas", action="store_true", help="assemble the modules")
    parser.add_argument("--install", action="store_true", help="install the compilers and nothing else")
    options = parser.parse_args()
    if options.install:
        nvrtc_library()
        ptxas_program()
        return
    files = generate()
    if options.check:
        check(files)
    else:
        write(files)
    texts = [text for name, text in files.items() if name.endswith(".ptx")]
    count = sum(len(entries(text)) for text in texts)
    version = re.search(rb"\.version (\S+)", texts[0])[1].decode()
    print(f"{len(texts)} modules: {count} entries, {sum(map(len, texts))} bytes, PTX {version}")
    if options.ptxas:
        assemble()


main()

"""Compiles the CUDA units as the worker does and checks what comes out. Standard library only; see check-cuda.

usage: check_cuda.py VENV [ARCH ...]
"""

import ctypes
import glob
import os
import re
import subprocess
import sys
import tempfile
import time

ARCHS = ["sm_80", "sm_89", "sm_90", "sm_100"]
REGISTERS_PER_BLOCK = 65536
SHARED_BYTES_PER_BLOCK = 48 * 1024  # what a launch gets without asking for more
SOURCES = "kernels/cuda"
UNITS = "kernels/src/cuda/units.rs"
OPTIONS = ["--std=c++17", "-lineinfo"]
# Values of the units' parameters that are compiled: GGUF type numbers F32 0, F16 1, Q4_0 2, Q4_1 3, Q8_0 8, BF16 30;
# and INT4 256, E4M3 257.
VARIANTS = {
    ("HEAD_DIM", "KV_FORMAT"): [(64, 1), (128, 30), (128, 1), (80, 0), (64, 257), (128, 257)],
    ("WEIGHT_FORMAT",): [(2,), (3,), (8,), (256,)],
    (): [()],
}
TENSOR_CORE_UNITS = {"attention": "HMMA", "linear": "HMMA"}


def find(venv, pattern):
    found = glob.glob(f"{venv}/lib/python3*/site-packages/nvidia/{pattern}")
    return found[0] if found else None


def units():
    """Names, kernels and parameters, from the table that the worker embeds."""
    text = open(UNITS).read()
    found = re.findall(
        r'Unit \{\s*name: "(\w+)",.*?kernels: &\[(.*?)\],\s*parameters: &\[(.*?)\],\s*\}', text, re.DOTALL
    )
    words = re.compile(r'"(\w+)"')
    table = [(name, words.findall(kernels), tuple(words.findall(parameters))) for name, kernels, parameters in found]
    on_disk = {os.path.basename(path)[:-3] for path in glob.glob(f"{SOURCES}/*.cu")}
    if {unit[0] for unit in table} != on_disk:
        sys.exit(f"{UNITS} lists {sorted(unit[0] for unit in table)}, {SOURCES} holds {sorted(on_disk)}")
    return table


class Nvrtc:
    def __init__(self, venv):
        path = find(venv, "cuda_nvrtc/lib/libnvrtc.so.12")
        if not path:
            sys.exit(f"no libnvrtc in {venv}: remove the directory and try again")
        self.lib = ctypes.CDLL(path)
        names = sorted(glob.glob(f"{SOURCES}/*.cuh"))
        self.headers = [(os.path.basename(name).encode(), open(name, "rb").read()) for name in names]

    def version(self):
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def compile(self, name, options):
        """PTX or, for a real architecture, a cubin; ends the program with the compiler's log if it refuses."""
        source = open(f"{SOURCES}/{name}.cu", "rb").read()
        program, count = ctypes.c_void_p(), len(self.headers)
        texts = (ctypes.c_char_p * count)(*[text for _, text in self.headers])
        names = (ctypes.c_char_p * count)(*[header for header, _ in self.headers])
        self.lib.nvrtcCreateProgram(ctypes.byref(program), source, f"{name}.cu".encode(), count, texts, names)
        flags = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        status = self.lib.nvrtcCompileProgram(program, len(options), flags)
        if status != 0:
            sys.exit(f"{name} {options}:\n{self.text(program, 'ProgramLog').decode()}")
        kind = "CUBIN" if any("=sm_" in option for option in options) else "PTX"
        code = self.text(program, kind)
        self.lib.nvrtcDestroyProgram(ctypes.byref(program))
        return code

    def text(self, program, kind):
        size = ctypes.c_size_t()
        getattr(self.lib, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.lib, f"nvrtcGet{kind}")(program, buffer)
        return buffer.raw


def assemble(venv, ptx, arch):
    """What ptxas says of each kernel of a unit: registers, static shared memory, spilled bytes, largest block."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(ptx.rstrip(b"\0"))
        file.flush()
        command = [find(venv, "cuda_nvcc/bin/ptxas"), "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    blocks = dict(re.findall(r"\.entry (\w+)\(.*?\.maxntid (\d+)", ptx.decode(errors="replace"), re.DOTALL))
    kernels = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.split("'")[0]
        def number(pattern, part=part):
            return sum(int(n) for n in re.findall(pattern, part))

        kernels[name] = {
            "registers": number(r"Used (\d+) registers"),
            "shared": number(r"(\d+) bytes smem"),
            "spills": number(r"(\d+) bytes spill"),
            "stack": number(r"(\d+) bytes stack frame"),
            "block": int(blocks[name]),
        }
    return kernels


def count_instructions(venv, cubin, mnemonic):
    """How often a cubin holds an instruction; none if there is no disassembler."""
    tool = find(venv, "cu13/bin/nvdisasm") or find(venv, "cuda_nvdisasm/bin/nvdisasm")
    if not tool:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return len(re.findall(rf"\b{mnemonic}\.", code))


def problems(name, kernels, facts, tensor_cores):
    if set(kernels) != set(facts):
        yield f"{UNITS} promises {sorted(kernels)}, the compiler found {sorted(facts)}"
    for kernel, fact in facts.items():
        if fact["spills"]:
            yield f"{kernel} spills {fact['spills']} bytes"
        if fact["registers"] * fact["block"] > REGISTERS_PER_BLOCK:
            yield f"{kernel} takes {fact['registers']} registers in blocks of {fact['block']}"
        if fact["shared"] > SHARED_BYTES_PER_BLOCK:
            yield f"{kernel} takes {fact['shared']} bytes of shared memory"
    if tensor_cores == 0:
        yield f"{name} does not use tensor cores"


def main():
    venv, archs = sys.argv[1], sys.argv[2:] or ARCHS
    nvrtc = Nvrtc(venv)
    failures, total, disassembled = [], 0.0, True
    print(f"NVRTC {nvrtc.version()}\n")
    header = f"{'unit':<32} {'arch':<7} {'kernel':<26} {'regs':>4} {'block':>5} {'shared':>6} {'stack':>5} {'s':>5}"
    print(header)
    for name, kernels, parameters in units():
        for values in VARIANTS[parameters]:
            defines = [f"-D{parameter}={value}" for parameter, value in zip(parameters, values)]
            unit = " ".join([name] + [f"{p}={v}" for p, v in zip(parameters, values)])
            for arch in archs:
                start = time.monotonic()
                cubin = nvrtc.compile(name, [f"--gpu-architecture={arch}"] + OPTIONS + defines)
                seconds = time.monotonic() - start
                total += seconds
                virtual = arch.replace("sm_", "compute_")
                facts = assemble(venv, nvrtc.compile(name, [f"--gpu-architecture={virtual}"] + OPTIONS + defines), arch)
                tensor_cores = None
                if name in TENSOR_CORE_UNITS:
                    tensor_cores = count_instructions(venv, cubin, TENSOR_CORE_UNITS[name])
                    disassembled &= tensor_cores is not None
                failures += [f"{unit} {arch}: {p}" for p in problems(name, kernels, facts, tensor_cores)]
                for kernel, fact in facts.items():
                    print(
                        f"{unit:<32} {arch:<7} {kernel:<26} {fact['registers']:>4} {fact['block']:>5} "
                        f"{fact['shared']:>6} {fact['stack']:>5} {seconds:>5.2f}",
                        flush=True,
                    )
    print(f"\ncompiled in {total:.1f} s")
    if not disassembled:
        print("tensor core instructions: not looked for, no disassembler")
    if failures:
        sys.exit("\n".join(failures))
    print("no spills, every block fits, tensor cores where they belong" if disassembled else "no spills, every block fits")


if __name__ == "__main__":
    main()

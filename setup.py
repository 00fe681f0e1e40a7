"""Builds fastfocal._C: C++ always, CUDA wherever nvcc is.

Switches, all environment variables:
  FASTFOCAL_CUDA=0|1     0: no CUDA; 1: fail where it cannot be compiled. Default: CUDA if nvcc is found.
  TORCH_CUDA_ARCH_LIST   e.g. "8.0;9.0+PTX"; default: every architecture below that nvcc knows, and PTX of the newest.
  FASTFOCAL_LINEINFO=1   source lines in the CUDA code, for profilers; the machine code is the same.
  CUDA_HOME, CXX, MAX_JOBS, NVCC_APPEND_FLAGS   as usual.
  FASTFOCAL_CXXFLAGS     more flags for the C++ compiler and the linker, after ours: "-O1", "-fsanitize=address".

Only torch's stable ABI is used: its headers, and the C symbols of libtorch_cpu, which every build of torch has. So the torch
of the environment that is being installed into will do, even from within pip's isolated build. It is not imported.
"""

import importlib.machinery
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.findall(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)[0]
TORCH_MINIMUM = (2, 10)
TARGET = "0x020A000000000000"  # the stable ABI of torch 2.10
DEFAULT_ARCHS = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "11.0", "12.0"]
AARCH64_ARCHS = ["8.7"]  # Orin: there is no card of it for other machines
X86_FLAGS = {
    # GCC 12's own AVX-512 headers warn about the undefined operand they mean (its bug 105593).
    "isa_avx512.cpp": [
        *["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"],
        *["-Wno-uninitialized", "-Wno-maybe-uninitialized"],
    ],
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}


def fail(message: str) -> None:
    sys.exit(f"fastfocal: {message}")


def switch(name: str) -> str:
    """An environment variable that is "0", "1" or not set ("")."""
    wish = os.environ.get(name, "")
    if wish not in ("", "0", "1"):
        fail(f"{name}: expected 0 or 1, got {wish!r}")
    return wish


# torch ----------------------------------------------------------------------------------------------------------------


def find_torch() -> Path | None:
    """The installed torch: of this interpreter, or of the environment around an isolated build."""
    where = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    # Inside pip's isolated build sys.prefix is still the real one, but sitecustomize has taken site-packages off sys.path.
    spec = importlib.machinery.PathFinder.find_spec("torch", where)
    if spec is None or not spec.submodule_search_locations:
        return None
    torch = Path(next(iter(spec.submodule_search_locations)))
    return torch if (torch / "include" / "torch" / "headeronly").is_dir() or (torch / "version.py").is_file() else None


def torch_version(torch: Path) -> str:
    match = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
    return match.group(1) if match else "0"


def check_torch(torch: Path) -> str:
    version = torch_version(torch)
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < TORCH_MINIMUM:
        fail(
            f"torch {version} is too old: torch >= {'.'.join(map(str, TORCH_MINIMUM))} is needed, "
            'the first with the whole stable ABI (pip install --upgrade "torch>=2.10")'
        )
    return version


# compilers ------------------------------------------------------------------------------------------------------------


def find_compiler() -> str:
    name = os.environ.get("CXX", "c++" if shutil.which("c++") else "g++")
    if shutil.which(name.split()[0]) is None:
        fail(f"no C++ compiler: {name!r} was not found; install g++ or clang++, or name one in CXX")
    return name


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        return str(nvcc) if nvcc.is_file() else None
    found = shutil.which("nvcc")
    if found:
        return found
    usual = Path("/usr/local/cuda/bin/nvcc")
    return str(usual) if usual.is_file() else None


def nvcc_facts(nvcc: str) -> tuple[str, set[str]]:
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", release)
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    archs = {f"{n[:-1]}.{n[-1]}" for n in re.findall(r"compute_(\d+)\b", known)}
    return (match.group(1) if match else "unknown"), archs


def toolkit_folders(nvcc: str) -> tuple[list[str], list[str]]:
    """The toolkit's include and library folders, asked of nvcc itself: it may be a wrapper, or a distribution's own layout."""
    said = subprocess.run([nvcc, "-dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    folders = {}
    for flag, variable in (("-I", "INCLUDES"), ("-L", "LIBRARIES")):
        line = next((x for x in said.splitlines() if x.startswith(f"#$ {variable}=")), "")
        folders[flag] = re.findall(rf'"?{flag}([^"\s]+)"?', line)
    return folders["-I"], folders["-L"]


def cuda_archs(known: set[str]) -> list[str]:
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        archs = [a for a in re.split(r"[;,\s]+", asked) if a]
        for arch in archs:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                fail(f"TORCH_CUDA_ARCH_LIST: {arch!r} is no compute capability such as 8.6 or 9.0+PTX")
        return archs
    wanted = DEFAULT_ARCHS + (AARCH64_ARCHS if platform.machine() == "aarch64" else [])
    archs = sorted((a for a in wanted if a in known), key=float)
    if archs:
        archs[-1] += "+PTX"
    return archs


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class Cuda:
    """What was decided about CUDA, once: nvcc, its version and the architectures; falsy without CUDA."""

    def __init__(self) -> None:
        wish = switch("FASTFOCAL_CUDA")
        self.lineinfo = switch("FASTFOCAL_LINEINFO") == "1"
        self.nvcc = None if wish == "0" else find_nvcc()
        self.version, self.archs = "", []
        if wish == "1" and self.nvcc is None:
            fail("FASTFOCAL_CUDA=1, but nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
        if self.nvcc:
            self.version, known = nvcc_facts(self.nvcc)
            self.archs = cuda_archs(known)
            self.includes, self.libraries = toolkit_folders(self.nvcc)
            self.why = f"CUDA {self.version} for {' '.join(self.archs)}"
        else:
            self.why = "no CUDA (FASTFOCAL_CUDA=0)" if wish == "0" else "no CUDA (nvcc was not found)"

    def __bool__(self) -> bool:
        return self.nvcc is not None


# the build ------------------------------------------------------------------------------------------------------------


class NinjaBuild(build_ext):
    """Compiles every source side by side through ninja, and links."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            fail("torch was not found; install it first (pip install torch)")
        built_for = check_torch(torch)
        cxx, cuda = find_compiler(), Cuda()
        print(f"fastfocal {VERSION}: building against torch {built_for} with {cxx} and {cuda.why}", flush=True)

        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        # pip's isolated build has its packages in another folder each time. Named by version here, an unchanged command line
        # lets ninja keep what is compiled.
        torch_include = versioned_link(work, f"torch-{built_for}", torch / "include")
        # pybind11's own headers first: torch brings a copy, which from 2.11 on refuses TORCH_TARGET_VERSION.
        includes = [
            versioned_link(work, f"pybind11-{pybind11.__version__}", Path(pybind11.get_include())),
            torch_include,
            torch_include / "torch" / "csrc" / "api" / "include",
            Path(sysconfig.get_path("include")),
        ]
        # -isystem: warnings are for our own code.
        common = [flag for path in includes for flag in ("-isystem", str(path))]
        common += [f"-DTORCH_TARGET_VERSION={TARGET}"]
        # Files are named in errors: by where they lie in the sources and in torch, not by where these lie on this machine.
        renamed = [f"-ffile-prefix-map={ROOT}=fastfocal", f"-ffile-prefix-map={torch}=torch"]
        debug = ["-O0", "-g"] if self.debug else ["-O3", "-DNDEBUG"]
        cflags = [
            *common,
            *debug,
            *renamed,
            "-std=c++17",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-unknown-pragmas",
        ]
        more = shlex.split(os.environ.get("FASTFOCAL_CXXFLAGS", ""))
        cflags += more
        facts = [
            f'-DFASTFOCAL_TORCH_VERSION="{built_for}"',
            f'-DFASTFOCAL_CUDA_VERSION="{cuda.version}"',
            f'-DFASTFOCAL_CUDA_ARCHS="{";".join(cuda.archs)}"',
        ]
        rules = [
            f"cxx = {cxx}",
            f"cflags = {shell(cflags)}",
            "rule cxx",
            "  command = $cxx $cflags $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = C++ $in",
            "rule link",
            "  command = $cxx -shared $in -o $out $ldflags",
            "  description = link $out",
        ]
        if cuda:
            # NDEBUG stays undefined: label errors are device-side assertions.
            flags = [*common, "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Werror=all-warnings"]
            # Quoted: nvcc splits at commas, and the shell that it calls at spaces.
            flags += [f'-Xcompiler="{flag}"' for flag in renamed]
            flags += ["--threads=1", *(["-lineinfo"] if cuda.lineinfo else []), *gencode(cuda.archs)]
            rules += [
                f"nvcc = {cuda.nvcc}",
                f"cuda_flags = {shell(flags)}",
                "rule cuda",
                "  command = $nvcc -ccbin $cxx $cuda_flags -MD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = CUDA $in",
            ]
        objects = []
        cxx_sources = [ROOT / "csrc" / "library.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
        cuda_sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if cuda else []
        if cuda:
            cxx_sources += sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
        x86 = platform.machine() in ("x86_64", "AMD64")
        for source in [*cuda_sources, *cxx_sources]:  # the slow ones first
            if source.name in X86_FLAGS and not x86:
                continue
            target = work / source.parent.name / (source.name + ".o")
            objects.append(target)
            rules.append(
                f"build {ninja_path(target)}: {'cuda' if source.suffix == '.cu' else 'cxx'} {ninja_path(source)}"
            )
            extra = X86_FLAGS.get(source.name, []) + (facts if source.name == "library.cpp" else [])
            if source.suffix == ".cpp" and source.parent.name == "cuda":
                extra += [flag for folder in cuda.includes for flag in ("-isystem", folder)]
            if extra:
                rules.append(f"  extra = {shell(extra)}")
        # No rpath: `import torch` has loaded libtorch_cpu, whichever it is, by the time the module is.
        ldflags = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ldl"]
        if sys.platform == "darwin":
            ldflags = ["-undefined", "dynamic_lookup"]
        if cuda:
            static = next((p for f in cuda.libraries if (p := Path(f) / "libcudart_static.a").is_file()), None)
            if static is None:
                fail(f"libcudart_static.a was not found in {cuda.libraries}; install the CUDA runtime's static library")
            ldflags += [str(static), "-lrt", "-lpthread"]
        rules.append(f"build {ninja_path(out)}: link {' '.join(ninja_path(o) for o in objects)}")
        rules.append(f"  ldflags = {shell([*ldflags, *more])}")
        (work / "build.ninja").write_text("\n".join(rules) + "\n")

        command = [ninja_command(), "-C", str(work), "-f", "build.ninja"]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        elif jobs() is not None:
            command += ["-j", str(jobs())]
        if subprocess.run(command).returncode != 0:
            fail("the compilation failed; the first error above says where")


def jobs() -> int | None:
    """As many as the cores this process may use: inside a container ninja sees the host's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def versioned_link(folder: Path, name: str, target: Path) -> Path:
    link = folder / name
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    return link


def shell(words: list[str]) -> str:
    """Words for a command line in a ninja file."""
    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_command() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            fail("ninja was not found (pip install ninja)")
        return found


# pip reads this as get_requires_for_build_wheel: torch is fetched for the build only where none is installed.
build_needs = [] if find_torch() else [f"torch>={'.'.join(map(str, TORCH_MINIMUM))}"]
if build_needs:
    print(
        "fastfocal: torch is not installed here, so it is fetched for this build, and again to run with; "
        "`pip install torch` first, and it is installed once",
        file=sys.stderr,
        flush=True,
    )

setup(
    ext_modules=[Extension("fastfocal._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
    setup_requires=build_needs,
)

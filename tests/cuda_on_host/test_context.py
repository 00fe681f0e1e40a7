"""csrc/cuda/context.cpp: which device is current where, and what it says when CUDA refuses.

It is compiled against stand-ins of torch and CUDA that model what the two CUDA runtimes of a process share: each has a
current device of its own, and whichever was set last decides the driver's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import host_build
import pytest
from cuda_on_host import build
from host_build import CSRC, Source, compiler

pytestmark = pytest.mark.skipif(shutil.which(compiler()[0]) is None, reason="no C++ compiler")

TORCH = {
    "torch/csrc/inductor/aoti_torch/c/shim.h": """#pragma once
        #include <cstdint>
        using AOTITorchError = int32_t;
    """,
    "torch/csrc/stable/tensor.h": """#pragma once
        #define TORCH_ERROR_CODE_CHECK(call) if ((call) != 0) throw std::runtime_error("torch: " #call)
        namespace torch::stable {
        struct Tensor {
          int device;
          int get_device_index() const { return device; }
        };
        }
    """,
    "torch/csrc/stable/accelerator.h": """#pragma once
        namespace model { extern int torch, driver; }
        namespace torch::stable::accelerator {
        struct DeviceGuard {  // as c10's: sets what is not set already
          int before = model::torch;
          static void set(int device) { if (device != model::torch) model::torch = model::driver = device; }
          explicit DeviceGuard(int device) { set(device); }
          ~DeviceGuard() { set(before); }
        };
        }
    """,
    "torch/headeronly/util/Exception.h": """#pragma once
        #define STD_TORCH_CHECK(condition, words) if (!(condition)) throw std::runtime_error(words)
    """,
}

MODEL = r"""
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <cstring>

#include "cuda/context.h"

namespace model {
int torch = 0, driver = 0, own = 0, asked = 0;
cudaError_t answer = cudaSuccess;
char words[1000];
}  // namespace model

cudaError_t cudaSetDevice(int device) {
  if (model::answer == cudaSuccess) model::own = model::driver = device;
  return model::answer;
}
cudaError_t cudaGetDevice(int* device) { *device = model::own; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { *version = 12040; return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of another kind"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  ++model::asked;
  constexpr int kMajor = 6, kMinor = 1;
  *value = attribute == cudaDevAttrMultiProcessorCount ? 100 + device
           : attribute == cudaDevAttrComputeCapabilityMajor ? kMajor : kMinor;
  return cudaSuccess;
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  *stream = reinterpret_cast<void*>(0x1000l + device);
  return 0;
}

// A call for a tensor on `device`, in a thread where torch's current device is `current`.
EXPORT void call(int current, int device, int answer, int* seen) {
  model::torch = model::driver = current;
  model::answer = cudaError_t(answer);
  std::strcpy(model::words, "");
  try {
    const torch::stable::Tensor tensor{device};
    const fastfocal::cuda::Context context(tensor);
    const int inside[] = {model::torch, model::driver, model::own, context.multiprocessors, int(long(context.stream))};
    std::memcpy(seen, inside, sizeof inside);
  } catch (const std::exception& error) {
    std::snprintf(model::words, sizeof model::words, "%s", error.what());
  }
  seen[5] = model::torch, seen[6] = model::driver, seen[7] = model::asked;
}
EXPORT const char* words() { return model::words; }
"""

PROGRAM = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)  # as torch's own is, where context.cpp looks for the stream
library.words.restype = ctypes.c_char_p
results = []
for current, device, answer in json.loads(sys.argv[2]):
    seen = (ctypes.c_int * 8)()
    library.call(current, device, answer, seen)
    results.append([*seen, library.words().decode()])
print(json.dumps(results))
"""

FIELDS = ("torch", "driver", "own", "multiprocessors", "stream", "torch_after", "driver_after", "asked", "words")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    for name, text in TORCH.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "model.cpp").write_text(MODEL)
    sources = [Source(CSRC / "cuda" / "context.cpp"), Source(folder / "model.cpp")]
    include = (folder, *build.INCLUDE, CSRC)
    return host_build.build_library("context", sources, folder, include=include, link=("-ldl",))


def calls(library: Path, *which: tuple[int, int, int]) -> list[dict[str, Any]]:
    """(torch's current device, the tensor's, what cudaSetDevice answers) each, one after the other in one process."""
    command = [sys.executable, "-c", PROGRAM, str(library), json.dumps(which)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [dict(zip(FIELDS, result, strict=True)) for result in json.loads(done.stdout)]


def test_the_tensors_device_is_current_in_both_runtimes(library: Path) -> None:
    which = [(current, device, 0) for current in range(3) for device in (1, 0, 2, 2)]
    for (current, device, _), seen in zip(which, calls(library, *which), strict=True):
        assert seen["words"] == ""
        assert (seen["torch"], seen["driver"], seen["own"]) == (device, device, device)
        assert seen["multiprocessors"] == 100 + device
        assert seen["stream"] == 0x1000 + device
        # Afterwards torch and the driver agree as before, whatever the runtime that only fastfocal uses has.
        assert (seen["torch_after"], seen["driver_after"]) == (current, current)


def test_attributes_are_asked_once(library: Path) -> None:
    assert [seen["asked"] for seen in calls(library, *[(0, 1, 0), (0, 1, 0), (0, 3, 0), (0, 1, 0)])] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            35,
            "the NVIDIA driver supports CUDA 12.4 at most, but fastfocal was built with CUDA 13.0; update the driver, or "
            "build fastfocal with a CUDA toolkit that it supports (CUDA_HOME)",
        ),
        (
            222,
            "the NVIDIA driver supports CUDA 12.4 at most, and cannot compile the PTX of CUDA 13.0 that fastfocal has for "
            "this GPU; update the driver, or build fastfocal for this GPU (TORCH_CUDA_ARCH_LIST)",
        ),
        (
            209,
            "fastfocal was not compiled for this GPU, compute capability 6.1, but for those in "
            'fastfocal.build_info()["cuda_archs"]; build it for this GPU (TORCH_CUDA_ARCH_LIST)',
        ),
        (
            98,  # what questions about a kernel are answered with
            "fastfocal was not compiled for this GPU, compute capability 6.1, but for those in "
            'fastfocal.build_info()["cuda_archs"]; build it for this GPU (TORCH_CUDA_ARCH_LIST)',
        ),
        (1, "an error of another kind"),
    ],
    ids=["driver_too_old", "ptx_too_new", "not_compiled_for_it", "no_such_kernel_on_it", "other"],
)
def test_what_cuda_refuses_is_one_sentence(library: Path, error: int, words: str) -> None:
    refused, fine = calls(library, (0, 1, error), (0, 1, 0))
    assert refused["words"] == f"fastfocal: CUDA: {words}"
    assert (refused["torch_after"], refused["driver_after"]) == (0, 0)  # the guard is released
    assert fine["words"] == ""

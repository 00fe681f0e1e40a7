// The module fastfocal._C: importing it registers the operators (schema.h has their schemas, cpu/ and cuda/ their kernels) and
// gives the facts of the build.
#include <pybind11/pybind11.h>

#include <utility>

#include "allocation.h"
#include "cpu/isa.h"
#include "schema.h"

STABLE_TORCH_LIBRARY(fastfocal, m) { fastfocal::define_operators(m); }

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of fastfocal; importing it registers torch.ops.fastfocal.";
  m.def("build_facts", [] {
    pybind11::dict facts;
    facts["torch_built_for"] = FASTFOCAL_TORCH_VERSION;
    facts["cuda"] = FASTFOCAL_CUDA_VERSION;
    facts["cuda_archs"] = FASTFOCAL_CUDA_ARCHS;
    facts["compiler"] = __VERSION__;
    facts["cpu_capability"] = fastfocal::cpu_capability();
    return facts;
  });
  m.def("losses", [] {  // what the operators know of each, for Python's registry to be held against
    pybind11::list losses;
    for (const fastfocal::LossFacts& facts : fastfocal::Losses::kFacts) {
      pybind11::list parameters;
      for (size_t i = 0; i < facts.count; ++i) parameters.append(facts.parameters[i].name);
      pybind11::dict loss;
      loss["number"] = static_cast<int64_t>(facts.kind);
      loss["name"] = facts.name;
      loss["parameters"] = parameters;
      loss["reads_scores"] = facts.reads_scores;
      loss["takes_anchors"] = facts.takes_anchors;
      losses.append(loss);
    }
    return losses;
  });
  m.def("failed_allocation", []() -> pybind11::object {  // forgotten when read
    const fastfocal::FailedAllocation failed = std::exchange(fastfocal::failed_allocation(), {});
    if (failed.bytes == 0) return pybind11::none();
    return pybind11::make_tuple(failed.bytes, failed.device, failed.error);
  });
}

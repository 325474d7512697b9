// The module fastgrpo._host: what needs neither torch nor a device. Arguments are validated by fastgrpo/host.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu_capability.h"
#include "packing.h"

PYBIND11_MODULE(_host, m) {
  using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.doc() = "Compiled twin of fastgrpo.host.";
  m.def("pack_by_token_budget", &fastgrpo::pack_by_token_budget, release_gil());
  m.def("balance", &fastgrpo::balance, release_gil());
  m.def("detect_cpu_isa", [] { return fastgrpo::name_of(fastgrpo::detect_cpu_isa()); });
}

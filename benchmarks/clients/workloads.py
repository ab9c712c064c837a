"""All workloads, by name."""

from __future__ import annotations

from benchmarks.clients import encoders, language_models, plain_models

WORKLOADS = {
    workload.name: workload
    for module in (language_models, encoders, plain_models)
    for workload in module.WORKLOADS
}

"""Benchmark runs: model × methods × datasets × regime × seeds, resumable, a line per case.

>>> from errata.bench import BenchConfig, plan
>>> config = BenchConfig.parse(
...     {"model": "atlas-gpt2", "methods": "rome", "datasets": "atlas", "limit": 2}
... )
>>> [(column.label, column.measured) for column in plan(config).columns]
[('base', 2), ('rome', 2)]
"""

from errata.bench.config import BenchConfig, DatasetSpec, MethodVariant, read_config
from errata.bench.engines import Engine, SerialEngine
from errata.bench.planning import BenchPlan, plan
from errata.bench.processes import ProcessEngine
from errata.bench.ray_engine import RayEngine
from errata.bench.results import RunDirectory, load
from errata.bench.runner import run

__all__ = [
    "BenchConfig",
    "BenchPlan",
    "DatasetSpec",
    "Engine",
    "MethodVariant",
    "ProcessEngine",
    "RayEngine",
    "RunDirectory",
    "SerialEngine",
    "load",
    "plan",
    "read_config",
    "run",
]

"""Native code through Apache TVM."""

from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.saved import load

__all__ = ["TvmArtifact", "TvmBackend", "load"]

"""Everything that errata promises for a method, run over this one."""

from errata.testing import MethodContract


class TestConstrainedFineTuning(MethodContract):
    method = "constrained-ft"

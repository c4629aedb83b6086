"""The contract that every method keeps, as a pytest class that plugin authors subclass.

    # tests/test_contract.py of your plugin
    from errata.testing import MethodContract

    class TestMyMethod(MethodContract):
        method = "my-method"

It runs on the embedded model and real cases of the `atlas` benchmark; nothing is downloaded.
Needs pytest, which is no dependency of errata itself.
"""

from errata.testing.contract import MethodContract
from errata.testing.models import edit_with, perturbed, state_of

__all__ = ["MethodContract", "edit_with", "perturbed", "state_of"]

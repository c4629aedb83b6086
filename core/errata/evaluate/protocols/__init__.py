"""The protocols that come with errata, one file each (or one for a close pair)."""

from errata.evaluate.protocol import Protocol
from errata.evaluate.protocols import counterfact, general, generation, probes

PROTOCOLS: tuple[Protocol, ...] = (
    counterfact.PROTOCOL,
    generation.PROTOCOL,
    probes.PORTABILITY,
    probes.LOCALITY,
    general.PROTOCOL,
)

__all__ = ["PROTOCOLS"]

"""The protocols that come with errata, one file each (or one for a close pair)."""

from errata.contract.protocol import Protocol
from errata.evaluate.protocols import (
    calibration,
    cost,
    counterfact,
    easyedit,
    general,
    generation,
    ke,
    knowedit,
    lifelong,
    mquake,
    probes,
    rake,
)

PROTOCOLS: tuple[Protocol, ...] = (
    counterfact.PROTOCOL,
    generation.PROTOCOL,
    probes.PORTABILITY,
    probes.LOCALITY,
    knowedit.PROTOCOL,
    rake.PROTOCOL,
    mquake.PROTOCOL,
    calibration.PROTOCOL,
    ke.PROTOCOL,
    lifelong.PROTOCOL,
    easyedit.PROTOCOL,
    general.PROTOCOL,
    cost.PROTOCOL,
)

__all__ = ["PROTOCOLS"]

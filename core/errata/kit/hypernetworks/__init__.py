"""Networks that are trained to edit: from an edit's gradient at the unedited model to factors.

MEND and KnowledgeEditor differ in the network and in the objective; what they share is here.
`signals` is what an edit asks of each matrix, `factors` what a network answers and how rows of a
batch are run with one answer each, `lessons` what the edited rows are then asked (`passages` of
texts, `predictions` of the base), `batches` keeps both in bounded memory, `training` is the loop,
and `trained` keeps the network with the base.

Every edit is computed at the unedited model and by itself: edits are order-free, and a batch of
them is each of them.
"""

from errata.kit.hypernetworks.factors import Factors, low_rank_deltas, rows_edited
from errata.kit.hypernetworks.lessons import Locality
from errata.kit.hypernetworks.settings import NetworkConfig
from errata.kit.hypernetworks.signals import Signals, signals_of
from errata.kit.hypernetworks.trained import edited_modules, trained_network
from errata.kit.hypernetworks.training import EditingNetwork, NetworkTraining

__all__ = [
    "EditingNetwork", "Factors", "Locality", "NetworkConfig", "NetworkTraining", "Signals",
    "edited_modules", "low_rank_deltas", "rows_edited", "signals_of", "trained_network",
]  # fmt: skip

"""Benchmarks as requests: readers for the published formats, and what they load.

>>> from errata.datasets import load
>>> load("atlas", limit=1).requests()[0].text
'The instrument of Oswin Galdor is'
"""

from errata.datasets.catalogue import READERS
from errata.datasets.dataset import Dataset, cases_of, load
from errata.datasets.reader import DatasetReader
from errata.datasets.record import Record

__all__ = ["READERS", "Dataset", "DatasetReader", "Record", "cases_of", "load"]

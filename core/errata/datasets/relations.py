"""What the relations of CounterFact, ParaRel and LAMA are called.

Wikidata's English labels first, then other names it lists (Wikidata is CC0).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "P17": ("country", "sovereign state"),
        "P19": ("place of birth", "birthplace"),
        "P20": ("place of death", "deathplace"),
        "P27": ("country of citizenship", "citizenship", "nationality"),
        "P30": ("continent",),
        "P31": ("instance of", "type"),
        "P36": ("capital", "capital city"),
        "P37": ("official language",),
        "P39": ("position held", "office held", "position"),
        "P47": ("shares border with", "borders", "neighbour"),
        "P101": ("field of work", "area of work", "discipline"),
        "P103": ("native language", "mother tongue", "first language"),
        "P106": ("occupation", "profession", "job"),
        "P108": ("employer", "workplace"),
        "P127": ("owned by", "owner"),
        "P131": ("located in the administrative territorial entity", "located in", "location"),
        "P136": ("genre", "music genre"),
        "P138": ("named after", "namesake", "named for"),
        "P140": ("religion", "religious affiliation", "faith"),
        "P159": ("headquarters location", "headquarters", "location of headquarters"),
        "P176": ("manufacturer", "maker", "made by"),
        "P178": ("developer", "developed by"),
        "P190": ("twinned administrative body", "twin town", "sister city"),
        "P264": ("record label", "music label", "label"),
        "P276": ("location", "located in"),
        "P279": ("subclass of", "kind of"),
        "P361": ("part of", "component of"),
        "P364": ("original language of film or TV show", "original language"),
        "P407": ("language of work or name", "language of work", "language"),
        "P413": ("position played on team / speciality", "position played", "playing position"),
        "P449": ("original broadcaster", "original network", "network"),
        "P463": ("member of", "membership"),
        "P495": ("country of origin", "origin"),
        "P527": ("has part(s)", "has part", "contains"),
        "P530": ("diplomatic relation", "diplomatic relations with"),
        "P641": ("sport", "sport played"),
        "P740": ("location of formation", "place of formation", "founded in"),
        "P937": ("work location", "place of work"),
        "P1001": ("applies to jurisdiction", "jurisdiction"),
        "P1303": ("instrument", "instrument played", "plays instrument"),
        "P1376": ("capital of",),
        "P1412": ("languages spoken, written or signed", "language spoken", "spoken language"),
    }
)

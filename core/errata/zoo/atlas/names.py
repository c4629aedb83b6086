"""The words that the invented world is made of. No name here is meant to be a real one."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Mira Anton Selda Joren Tilda Bram Odile Karsten Nelia Ruvan Ysolde Davin Petra Lorcan Hesta "
    "Emeric Vanya Oswin Calla Torben Ilsa Marek Fenna Alaric Junia Rolf Senna Ivo Maren Casimir "
    "Lioba Egon Thessa Ulric Brida Stellan"
)
SURNAMES = _words(
    "Solen Varga Ostrand Kellim Brandoff Teyra Morvane Quillis Harwell Dunmore Ashgrove Pellam "
    "Rastin Vosk Lindqvar Corvell Estrom Fairwin Galdor Hollin Jastrow Krane Lowmark Nordby"
)
CITIES = _words(
    "Oakmere Velmont Tarsk Brinford Calder Dunwick Eldham Farrow Gorsk Halmstead Ivrenna Jorvale "
    "Kestrel Lunden Marrow Norhaven Ombra Pellstad Quarrel Rosmark Silvane Thornby Ulmar Vesper "
    "Wexmoor Yarrow Zelland Ardvik Bellmar Corvik Drossel Emberly Fenwick Glarvik Hollow Istrand"
)
COUNTRIES = _words(
    "Varania Ostrel Kandor Mirevia Tolland Zephyria Brusk Elandor Gravia Norvenna Palonia Sudrel"
)
LANGUAGES = _words(
    "Varanian Ostric Kandic Mirevian Tollish Zephyric Bruskan Elandic Gravian Norvennic Palonese "
    "Sudric"
)
COMPANY_STEMS = _words(
    "Halcyon Borealis Tessera Quorum Lodestar Meridon Vantage Ironwood Cinder Palisade Arbor "
    "Zenith Nimbus Copperfield Northgate"
)
COMPANY_SUFFIXES = _words("Works Systems Trading Brothers Group Partners")

WORD_LISTS: dict[str, tuple[str, ...]] = {
    "profession": _words(
        "carpentry botany law painting medicine teaching astronomy chemistry farming printing "
        "banking masonry journalism geology cooking tailoring"
    ),
    "instrument": _words(
        "violin flute harp trumpet cello drum piano organ guitar oboe lute clarinet"
    ),
    "sport": _words(
        "tennis rowing fencing chess cycling boxing sailing climbing archery skating golf wrestling"
    ),
    "collectible": _words(
        "stamps coins maps clocks shells masks dolls knives bottles kites lamps buttons feathers "
        "fossils"
    ),
    "river": _words("Ister Velda Moren Kaspar Lathe Orrin Sable Tamble Wend Yssel"),
    "good": _words("cheese honey glass wool bread wine silk leather pottery salt carpets perfume"),
    "weekday": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "currency": _words("talon dorin krell marlo sint brack velar oston pell gran lume zarn"),
    "continent": _words("Aurentia Borland Cassia Drune"),
    "animal": _words("eagle wolf bear lion stag falcon otter heron lynx bison fox crane"),
    "flower": _words("rose lily iris poppy tulip orchid daisy violet lotus thistle clover jasmine"),
    "industry": _words(
        "mining shipping insurance textiles steel energy publishing aviation logistics software "
        "forestry tourism"
    ),
    "product": _words(
        "engines bicycles furniture paper cameras boats shoes bricks batteries toys soap tractors "
        "pianos cables umbrellas mirrors"
    ),
    "colour": _words("red blue green yellow purple orange black white"),
}

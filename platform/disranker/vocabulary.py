"""The words of the made-up shop: products and their names, what they may be like, and how a text mentions them.

A word of a facet or brand means one thing only, so that meaning can be learned; names may share words
("alarm clock", "clock"), as real ones do.
"""

import itertools

import numpy as np

Names = tuple[str, ...]

# Two products of a row replace each other at need; one name of each is drawn for a text.
FAMILIES: tuple[tuple[Names, Names], ...] = (
    (("sofa", "couch", "settee"), ("armchair", "recliner", "easy chair")),
    (("desk", "writing table", "workstation"), ("table", "dinner board", "trestle")),
    (("bed", "bedstead", "divan"), ("daybed", "futon", "sleeper")),
    (("wardrobe", "closet", "armoire"), ("dresser", "bureau", "chest of drawers")),
    (("bookcase", "book rack", "library unit"), ("shelf", "ledge", "wall rack")),
    (("lamp", "table lamp", "reading light"), ("chandelier", "pendant", "ceiling light")),
    (("rug", "carpet", "floor mat"), ("doormat", "runner", "entry mat")),
    (("curtain", "drape", "window panel"), ("blind", "shade", "shutter")),
    (("cushion", "pillow", "bolster"), ("blanket", "throw", "quilt")),
    (("mirror", "looking glass", "reflector"), ("picture", "wall art", "poster")),
    (("stool", "perch", "bar seat"), ("bench", "pew", "long seat")),
    (("ottoman", "footstool", "pouffe"), ("bean bag", "floor seat", "sack chair")),
    (("pan", "skillet", "frypan"), ("pot", "saucepan", "casserole")),
    (("kettle", "water boiler", "tea maker"), ("percolator", "coffee maker", "espresso machine")),
    (("mug", "cup", "beaker"), ("tumbler", "goblet", "drinking glass")),
    (("plate", "dish", "platter"), ("bowl", "basin", "tureen")),
    (("bin", "trash can", "wastebasket"), ("hamper", "laundry basket", "clothes bin")),
    (("clock", "timepiece", "wall dial"), ("alarm clock", "wake light", "bedside timer")),
    (("vase", "urn", "flower jar"), ("planter", "flower pot", "plant tub")),
    (("heater", "radiator", "stove"), ("fan", "cooler", "ventilator")),
    (("vacuum", "hoover", "floor cleaner"), ("broom", "sweeper", "mop")),
    (("towel", "bath sheet", "washcloth"), ("bathrobe", "dressing gown", "robe")),
    (("crib", "cot", "baby bed"), ("high chair", "feeding seat", "booster")),
    (("cabinet", "cupboard", "sideboard"), ("trolley", "cart", "serving wagon")),
    (("parasol", "umbrella", "sunshade"), ("hammock", "swing", "hanging bed")),
)

# A thing for a product is named after it ("couch slipcover"): nearly the same words, not what was asked.
ACCESSORIES: tuple[tuple[Names, Names], ...] = (
    (("cover", "slipcover", "protector"), ("sofa", "table", "bed", "parasol")),
    (("hook", "hanger", "peg"), ("curtain", "mirror", "towel")),
    (("stand", "holder", "mount"), ("lamp", "clock", "vase")),
)

# Each row is a value, its words mean the same. In the order in which English puts them before a noun.
FACETS: dict[str, tuple[Names, ...]] = {
    "brand": tuple(
        (name,)
        for name in (
            *("nordhem", "velora", "castello", "brimley", "oakvale", "luminar", "tessaro", "haldane"),
            *("mirabel", "fjordal", "pembury", "zanotta"),
        )
    ),
    "size": (
        ("small", "compact", "mini"),
        ("large", "big", "oversized"),
        ("narrow", "slim", "thin"),
        ("tall", "lofty", "towering"),
        ("wide", "broad", "extended"),
    ),
    "style": (
        ("modern", "contemporary", "sleek"),
        ("rustic", "farmhouse", "country"),
        ("vintage", "retro", "antique"),
        ("minimalist", "simple", "plain"),
        ("classic", "traditional", "elegant"),
        ("boho", "artistic", "playful"),
    ),
    "colour": (
        ("grey", "charcoal", "slate"),
        ("black", "ebony", "jet"),
        ("white", "ivory", "snow"),
        ("blue", "navy", "cobalt"),
        ("green", "emerald", "olive"),
        ("red", "crimson", "scarlet"),
        ("yellow", "mustard", "amber"),
        ("pink", "blush", "rose"),
    ),
    "material": (
        ("wooden", "oak", "timber"),
        ("metal", "steel", "iron"),
        ("fabric", "linen", "cotton"),
        ("leather", "suede", "hide"),
        ("ceramic", "clay", "porcelain"),
        ("plastic", "acrylic", "resin"),
        ("wicker", "rattan", "bamboo"),
    ),
    "room": (
        ("bedroom", "sleeping", "dormitory"),
        ("kitchen", "cooking", "pantry"),
        ("office", "study", "workspace"),
        ("garden", "patio", "outdoor"),
        ("nursery", "kids", "playroom"),
        ("hallway", "entrance", "foyer"),
    ),
}

# How a summary states a value, by facet in the order above; the brand stands in the title.
STATED: Names = ("by {}", "{} in size", "{} look", "{} finish", "built with {}", "for {} use")

# Mentions of something else, to fool whoever only counts words: {0} a word of a facet, {1} a product's name.
MENTIONS: Names = (
    "goes well with our {0} {1}",
    "matches any {0} {1}",
    "not for the {0} {1}",
    "others also bought this {0} {1}",
    "fits beside the {0} {1}",
)
PRAISE: Names = ("easy to clean", "ships in two days", "loved by many homes", "two year guarantee", "gift ready")

USUAL = (0.65, 0.2, 0.15)  # how often each of a value's words, or a product's names, is the one used


def _concepts() -> tuple[tuple[Names, ...], np.ndarray]:
    """Names of each concept; how near (asked, offered) are: 3 same, 2 related, 1 accessory or its product, 0 not."""
    names = list(itertools.chain.from_iterable(FAMILIES))
    row = {each[0]: number for number, each in enumerate(names)}
    near = {(a, a ^ 1): 2 for a in range(len(names))}  # the two of a family stand side by side
    for suffixes, products in ACCESSORIES:
        for product in products:
            near |= {(row[product], len(names)): 1, (len(names), row[product]): 1}
            names.append(tuple(f"{name} {suffix}" for name in names[row[product]] for suffix in suffixes))
    nearness = np.eye(len(names), dtype=np.int8) * 3
    for pair, value in near.items():
        nearness[pair] = value
    return tuple(names), nearness


CONCEPTS, NEARNESS = _concepts()
_VALUES = list(FACETS.values())


def pick(words: Names, number: int) -> str:
    """One of the words, whatever the number."""
    return words[number % len(words)]


def word(facet: int, value: int, number: int) -> str:
    """A word for the value of a facet; "" for a value below 0, which stands for none."""
    return "" if value < 0 else pick(_VALUES[facet][value], number)


def name_and_words(concept: int, name: int, values: list[int], numbers: list[int]) -> tuple[str, list[str]]:
    """The product's name, and a word for each facet."""
    return pick(CONCEPTS[concept], name), [
        word(facet, *pair) for facet, pair in enumerate(zip(values, numbers, strict=True))
    ]


def describe(concept: int, name: str, words: list[str], titled: list[bool], draws: list[int]) -> tuple[str, str]:
    """Title and summary. What the title leaves out the summary states; then it speaks of something else.

    `words` and `titled` (shown in the title or not) go by facet, `titled` without the brand; `draws` are 10 numbers.
    """
    brand, *rest = words
    title = " ".join([brand, *(each for each, there in zip(rest, titled, strict=True) if there), name])
    stated = ", ".join(how.format(each) for how, each, there in zip(STATED[1:], rest, titled, strict=True) if not there)
    said = [stated, pick(PRAISE, draws[1])]
    if draws[0] % 10 < 3:
        said.insert(1, f"the {pick(CONCEPTS[concept], draws[2])} you will love")
    mentioned = (3, 6)[: (0, 0, 0, 0, 0, 1, 1, 1, 1, 2)[draws[9] % 10]]
    said += [_mention(concept, draws[first : first + 3]) for first in mentioned]
    return title, ". ".join(said) + "."


def _mention(concept: int, draws: list[int]) -> str:
    """Of any other product."""
    other, facet = (concept + 1 + draws[0] % (len(CONCEPTS) - 1)) % len(CONCEPTS), 1 + draws[1] % (len(_VALUES) - 1)
    like = word(facet, draws[2] % len(_VALUES[facet]), draws[2] // 64)
    return pick(MENTIONS, draws[1] // 64).format(like, pick(CONCEPTS[other], draws[0] // 1024))

"""Queries in one spelling and without personal data; searches without bots and without pages looked at twice.

The limits stand in `recipe.Cleaning`. Everything here is by text or by client, so that parts that hold whole clients
are cleaned one by one.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from disranker import tables
from disranker.inputs import Cleaning

TELLING_HITS = 5  # on a page: who opens the one document of a shorter page is no bot
HOUR_MS = 3_600_000

# Unicode's Default_Ignorable_Code_Point (invisible: soft hyphen, zero-width space, bidi controls, fillers, variation
# selectors, tags, BOM) but for ZWNJ and ZWJ; marks of interlinear notes; the tatweel, which only stretches a word.
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u0640\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")
JOINERS = re.compile("[\u200c\u200d]+")
NOT_JOINING = frozenset("آأؤإاةدذرزوٱڈڑژۀۃەۆۇۈۋے")  # Arabic letters that no ZWNJ parts from what follows
SYMBOLS = ("So", "Sk", "Sm")  # of emoji: pictures, skin tones, arrows
VIRAMA = 9  # its combining class

# NFKC would part these marks, which belong to the letter before them, from it by a space.
SPACED = (0x309B, 0x309C, *range(0xFC5E, 0xFC64), *range(0xFE70, 0xFE80))
ATTACHED = {mark: unicodedata.normalize("NFKC", chr(mark)).replace(" ", "") for mark in SPACED}

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u30ff\u3130-\u318f\u3400-\u9fff\uac00-\ud7af"
LETTER_OF_UNSPACED = re.compile(f"(?!\\d)[{UNSPACED}\U00020000-\U0003ffff]")
DASH = re.compile(
    "[\u2010-\u2015\u2212]|(?<=\\d)\u30fc(?=\\d)"
)  # the last is the long vowel of Japanese, in 03ー1234ー5678
SAID = r'[^\s@<>,;:"()]'
EMAIL = re.compile(rf"{SAID}{{1,64}}@{SAID}{{1,255}}\.[^\W\d_](?:(?!\d){SAID})+")
BEGIN, END = r"(?<!\w)(?<!\+)(?<!\d[-.,/])", r"(?!\w|[-.,/]\d)"  # of a number: no part of a word or of a longer number
DIGIT_GROUPS = re.compile(r"(?<!\w)(?<!\d[.,])\d+(?:[ -]\d+)*(?!\w|[.,]\d)")
# By first digits and length: Visa, American Express, Diners, JCB, Mastercard, Mir, Maestro, UnionPay, RuPay, Troy.
ISSUED = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11,16}|(?:2[2-7]|35|5[0-8]|6\d|8[12])\d{14,17}|9792\d{12}"
)
GAP = r"(?:\ ?[-./]\ ?|\ )"
PHONE = re.compile(
    rf"""{BEGIN}(?:
    (?P<abroad>(?:\+\ ?|(?<!\b\d\ )00)[1-9](?:(?:{GAP}|\ ?\(|\)\ ?|\)-)?\d){{7,14}})
    | (?:[18]{GAP}?)?\((?:0[1-9]\d{{0,3}}|\d{{2,3}})\)(?:{GAP}?\d{{2,9}}){{1,5}}
    | 0[1-9]\d{{0,3}}(?:{GAP}\d{{2,8}}){{1,5}}
    | (?:1{GAP})?[2-9]\d\d(?P<gap>[-.])\d{{3}}(?P=gap)\d{{4}}
    | [18]{GAP}[2-9]\d\d{GAP}\d{{3}}{GAP}(?:\d{{4}}|\d\d{GAP}\d\d)
    | 1[3-9]\d{GAP}\d{{4}}{GAP}\d{{4}}
    | (?:0[1-9]|1[3-9])\d{{9}}
    ){END}""",
    re.VERBOSE,
)
LAST_GROUP = re.compile(r"\D+\d+$")
MANY = 1 << 16  # queries in memory: in a log the same ones come again and again
KINDS = ("email", "card", "phone")
RULES = ("rate", "volume", "click_through", "no_click", "repetition")  # that tell a bot


@lru_cache(MANY)
def normalise(query: str) -> str:
    """One spelling for the ways to type a query: NFKC, case folded, single spaces, nothing that cannot be seen.

    Invisible characters vanish, control characters part words as a space does. ZWNJ and ZWJ stay where a reader sees
    them: beside a virama (Indic), ZWNJ between Arabic letters that would join (Persian), ZWJ inside an emoji.
    """
    text = query.casefold()
    if not query.isascii():
        text = _nfkc(query.translate(ATTACHED)).casefold()
        text = _nfkc(INVISIBLE.sub("", _nfkc(text)))  # folding may leave accents in another order
        text = _nfkc(JOINERS.sub(_joiner, text))  # what a joiner parted may now be one letter
    return " ".join(CONTROLS.sub(" ", text).split())


def _nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _joiner(run: re.Match[str]) -> str:
    """The first of a run of joiners where it carries meaning, else nothing."""
    text, joiner = run.string, run[0][0]
    before, after = text[run.start() - 1 : run.start()], text[run.end() : run.end() + 1]
    if not before:
        return ""
    if VIRAMA in (unicodedata.combining(before), unicodedata.combining(after or " ")):
        return joiner
    if not after:
        return ""
    if joiner == "\u200d":
        return joiner if all(unicodedata.category(side) in SYMBOLS for side in (before, after)) else ""
    letter = next((char for char in reversed(text[: run.start()]) if not unicodedata.combining(char)), " ")
    joins = unicodedata.bidirectional(letter) == unicodedata.bidirectional(after) == "AL" and letter not in NOT_JOINING
    return joiner if joins else ""


@lru_cache(MANY)
def mask(query: str) -> tuple[str, tuple[str, ...]]:
    """The query normalised, with `<email>`, `<card>` and `<phone>` for personal data, and which kinds it held.

    In digits of any script. Masked:
    - addresses with a dot after the @;
    - cards: 13 to 19 digits, whole or in groups of three or more, of an issuer's form and with the right Luhn sum;
    - phones: + or 00 and 8 to 15 digits; 9 to 12 digits in groups that begin with 0 and another digit, or with an area
      code in parentheses; 555-123-4567, 1 555 123 4567, 8 912 345 67 89, 138 0013 8000; 11 digits that begin with 01
      to 09 or 13 to 19.
    Not masked, because products are named so: GTINs (EAN, UPC), ISBNs, other whole numbers of up to 10 digits and from
    12 on, sizes, years, decimals, model numbers with letters, and 555 123 4567 (width, depth, height).
    """
    text, found = normalise(query), set()
    while spans := _personal(text):
        for start, end, kind in reversed(spans):
            text = f"{text[:start]}<{kind}>{text[end:]}"
            found.add(kind)
        text = normalise(text)  # an accent after what was masked may join with the ">"
    return text, tuple(kind for kind in KINDS if kind in found)


def _personal(text: str) -> list[tuple[int, int, str]]:
    """(start, end, kind) of what to mask, in order and apart."""
    if "@" not in text and sum(map(str.isdecimal, text)) < 8:
        return []
    plain = _plain(text)
    addresses = [match.span() for match in EMAIL.finditer(plain)] or [match.span() for match in EMAIL.finditer(text)]
    taken: list[tuple[int, int, str]] = []
    for kind, spans in zip(KINDS, (addresses, _cards(plain), _phones(plain)), strict=True):
        free = [span for span in spans if all(span[1] <= start or end <= span[0] for start, end, _ in taken)]
        taken += [(*span, kind) for span in free]
    return sorted(taken)


def _plain(text: str) -> str:
    """The text, character by character, with ASCII digits and dashes; letters that need no space to part from a number
    (Chinese, Japanese, Korean, Thai and others) as line ends."""
    if text.isascii():
        return text
    plain = re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), DASH.sub("-", text))
    return LETTER_OF_UNSPACED.sub("\n", plain)


def _cards(plain: str) -> Iterator[tuple[int, int]]:
    for run in DIGIT_GROUPS.finditer(plain):
        groups = [(run.start() + group.start(), run.start() + group.end()) for group in re.finditer(r"\d+", run[0])]
        for first, (start, _) in enumerate(groups):
            for _, end in reversed(groups[first : first + 6]):
                if _is_card(re.split("[ -]", plain[start:end])):
                    yield start, end


def _is_card(groups: list[str]) -> bool:
    digits = "".join(groups)
    if min(map(len, groups)) < 3 or not ISSUED.fullmatch(digits) or _is_gtin(digits):
        return False
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[::-2]))) % 10 == 0


def _phones(plain: str) -> Iterator[tuple[int, int]]:
    for match in PHONE.finditer(plain):
        number = match[0]
        least, most = (8, 17) if match["abroad"] else (9, 12)
        while _digits(number) > most:
            number = LAST_GROUP.sub("", number)
        if _digits(number) >= least and not _is_gtin(number):
            yield match.start(), match.start() + len(number)


def _digits(text: str) -> int:
    return sum(map(str.isdigit, text))


def _is_gtin(number: str) -> bool:
    """Whether it is whole and its check digit is that of an EAN-8, UPC, EAN-13 or GTIN-14."""
    if not number.isdecimal() or len(number) not in (8, 12, 13, 14):
        return False
    return (3 * sum(map(int, number[-2::-2])) + sum(map(int, number[::-2]))) % 10 == 0


def masked(column: pl.Series) -> tuple[pl.Series, dict[str, int]]:
    """Queries as `mask` has them -> (queries, how many rows held each kind)."""
    typed = column.drop_nulls().value_counts(name="rows")
    done = [mask(query) for query in typed[column.name]]
    texts = pl.Series([text for text, _ in done], dtype=pl.String)
    rows = typed["rows"].to_list()
    counts = {kind: sum(n for n, (_, kinds) in zip(rows, done, strict=True) if kind in kinds) for kind in KINDS}
    return column.replace_strict(typed[column.name], texts, default=None, return_dtype=pl.String), counts


def activity(searches: pa.Table) -> pl.DataFrame:
    """What clients did, a small row for each search; `bots` takes those of several tables, one below the other."""
    shown, clicks = _shown(searches["hits"])
    telling = shown >= TELLING_HITS
    milliseconds = searches["time"].cast(pa.int64()).to_numpy()
    return pl.DataFrame(
        {
            "client": pl.from_arrow(searches["client"]),
            "hour": (milliseconds // HOUR_MS).astype(np.int32),
            "query": pl.Series(pl.from_arrow(searches["query"])).hash(),
            "clicks": clicks,
            "telling_pages": telling.astype(np.int32),
            "telling_hits": shown * telling,
            "telling_clicks": clicks * telling,
        }
    )


def _shown(hits: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """How many documents each page showed, and how many of them were clicked."""
    shown = pc.fill_null(pc.list_value_length(hits), 0).to_numpy().astype(np.int32)
    clicked = pc.fill_null(pc.struct_field(pc.list_flatten(hits), "clicked"), False).to_numpy()
    before = np.concatenate([[0], np.cumsum(clicked, dtype=np.int32)])
    ends = np.cumsum(shown)
    return shown, before[ends] - before[ends - shown]


def bots(active: pl.DataFrame, cfg: Cleaning) -> pl.DataFrame:
    """(client, rule) for each limit that a client exceeds; it may exceed several. A limit of 0 is off."""
    limits = (
        ("busiest_hour", cfg.max_searches_per_hour),
        ("busiest_day", cfg.max_searches_per_day),
        ("click_share", cfg.max_click_share),
        ("unclicked", cfg.max_searches_without_click),
        ("repeats", cfg.max_repeats_per_day),
    )
    rules = dict(zip(RULES, limits, strict=True))
    counts = [int(limit) + 1 for rule, (_, limit) in rules.items() if limit and rule != "click_through"]
    clients = _clients(active, min([cfg.min_pages_for_click_share, *counts]), cfg.min_pages_for_click_share)
    over = [
        clients.filter(pl.col(column) > limit).select("client", rule=pl.lit(rule))
        for rule, (column, limit) in rules.items()
        if limit
    ]
    return pl.concat([clients.clear().select("client", rule=pl.lit("")), *over]).sort("client", "rule")


def _clients(active: pl.DataFrame, min_searches: int, min_pages: int) -> pl.DataFrame:
    """(client, busiest_hour, busiest_day, click_share, unclicked, repeats) of clients with so many searches."""
    total = active.group_by("client").agg(pl.col("^telling_.*$", "clicks").sum(), searches=pl.len())
    total = total.filter(pl.col("searches") >= min_searches)
    # Most clients are far from any limit; what is left is small.
    busy = active.join(total, on="client", how="semi").with_columns(day=pl.col("hour") // 24)
    for name, keys in (("busiest_hour", ["hour"]), ("busiest_day", ["day"]), ("repeats", ["day", "query"])):
        most = busy.group_by("client", *keys).len().group_by("client").agg(pl.col("len").max().alias(name))
        total = total.join(most, on="client")
    share = pl.col("telling_clicks") / pl.col("telling_hits")
    return total.with_columns(
        click_share=pl.when(pl.col("telling_pages") >= min_pages).then(share),
        unclicked=pl.when(pl.col("clicks") == 0).then(pl.col("searches")),
    )


def sessions(searches: pl.DataFrame, gap_s: float) -> pl.DataFrame:
    """The searches, in their order, with `session`: from 0 within the client, a new one after more than `gap_s`."""
    by_time = searches.select(pl.col("client").hash(), "time").with_row_index("row").sort("client", "time", "row")
    other = pl.col("client").ne_missing(pl.col("client").shift())
    begun = (other | (pl.col("time").diff().dt.total_milliseconds() > gap_s * 1000)).cast(pl.Int32).cum_sum()
    number = begun - pl.when(other).then(begun).forward_fill()
    return searches.with_columns(by_time.with_columns(session=number).sort("row")["session"])


def pages(searches: pa.Table, gap_s: float) -> pl.Series:
    """A number for each search that those share which load one page again: same client, session, query, first hit."""
    seen = pl.DataFrame(pl.from_arrow(searches.select(["client", "query", "time"])))
    page = pl.struct("client", "session", "query", "first").hash()
    return sessions(seen.with_columns(first=_first(searches["hits"])), gap_s).select(page.alias("page"))["page"]


def merged(searches: pa.Table, page: pl.Series) -> tuple[pa.Table, dict[str, int]]:
    """Searches with one for each number of `page`, and counts: a page that was loaded again is one look, not two.

    The first of them stays, as it was shown. A document on it was clicked or bought if it was so on any of them, with
    the dwell of all. Clicks on a document that only a later one shows are lost and counted.
    """
    plain = pa.schema([tables.SCHEMAS["searches"].field(name) for name in searches.column_names])
    rows = pl.DataFrame(pl.from_arrow(searches.cast(plain))).with_row_index("row").with_columns(page.alias("page"))
    several = rows.with_columns(kept=pl.col("row").sort_by("time", "row").first().over("page"))
    hits, lost = _merged(several.select("row", "kept", "hits").explode("hits").unnest("hits"))
    first = several.filter(pl.col("row") == pl.col("kept")).join(hits, on="kept", how="left", maintain_order="left")
    whole = first.with_columns(hits=pl.coalesce("merged", "hits")).select(plain.names).to_arrow()
    return whole.cast(plain), {"repeated_pages": rows.height - first.height, "lost_clicks": lost}


def _first(hits: pa.ChunkedArray) -> np.ndarray:
    """The position of the first hit of each page; -1 where there is none."""
    shown = pc.fill_null(pc.list_value_length(hits), 0).to_numpy()
    positions = pc.fill_null(pc.struct_field(pc.list_flatten(hits), "position"), -1).to_numpy()
    return np.asarray(np.append(positions, -1)[np.where(shown > 0, np.cumsum(shown) - shown, -1)])


def _merged(seen: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Hits of pages that are loads of one page `kept` -> ((kept, merged), clicks on what that did not show)."""
    key = ["kept", "doc_id"]
    done = seen.group_by(key).agg(
        pl.col("clicked", "converted").any(),
        # A sum of nothing known is unknown, not zero seconds.
        dwell_s=pl.when(pl.col("dwell_s").is_not_null().any()).then(pl.col("dwell_s").sum()),
    )
    shown = seen.filter(pl.col("row") == pl.col("kept")).select(*key, "position")
    lost = seen.filter(pl.col("clicked")).join(shown, on=key, how="anti").height
    fields = ["doc_id", "position", "clicked", "dwell_s", "converted"]
    hits = shown.join(done, on=key).sort("kept", "position").group_by("kept").agg(merged=pl.struct(fields))
    return hits, lost


def few_clients(queries: pl.DataFrame, min_clients: int) -> pl.Series:
    """The queries that fewer than so many distinct clients typed, to be left out: k-anonymity."""
    return queries.filter(pl.col("clients") < min_clients)["query"]

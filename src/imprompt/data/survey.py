"""One line about the data of a run: how many records have a caption, where it was found, and what was not read."""

from collections import Counter
from collections.abc import Iterable
from itertools import islice

from imprompt.data.captions import Caption
from imprompt.data.folders import describe_skipped
from imprompt.data.records import MapRecords, Records
from imprompt.errors import UserError

MAX_SURVEYED = 10_000  # records that are looked at, at even distances


def describe_data(records: Records) -> str:
    """The captions of the records by source, and what is not read; of a stream, those of its first records. No image is opened."""
    if isinstance(records, MapRecords):
        step = -(-len(records) // MAX_SURVEYED) if len(records) else 1
        line = describe_captions((_read_source(records, i) for i in range(0, len(records), step)), "records")
        line += f" of {len(records):,} (every {step}th)" if step > 1 else ""
    else:
        stream = (record for shard in records.shards for record in records.read_shard(shard))
        line = describe_captions((record.caption_source for record in islice(stream, 1_000)), "first records of the shards")
    skipped = describe_skipped(getattr(records, "skipped", None) or Counter())
    return line + (f"; not used: {skipped}" if skipped else "")


def describe_captions(sources: Iterable[str | None], noun: str = "records") -> str:
    """`8 of 10 records have a caption (8 .txt), 1 cannot be read`, from the source of each: "" without a caption, None if unreadable."""
    counts = Counter(sources)
    unreadable, total = counts.pop(None, 0), counts.total()
    with_caption = total - counts.pop("", 0)
    by_source = ", ".join(f"{count:,} {source}" for source, count in counts.most_common(4))
    line = f"{with_caption:,} of {total:,} {noun} have a caption" + (f" ({by_source})" if by_source else "")
    return line + (f"; of {unreadable:,} more it cannot be read" if unreadable else "")


def _read_source(records: MapRecords, i: int) -> str | None:
    get_caption = getattr(records, "get_caption", None)
    try:
        caption: Caption = get_caption(i) if get_caption else Caption(records[i].caption, records[i].caption_source or "caption")
    except UserError:
        return None
    return caption.source

"""Opening of shard files by their suffix."""

from pathlib import Path

from pixart.data.adoption.array_record_shard import ArrayRecordShard
from pixart.data.adoption.forms import Shard
from pixart.data.adoption.shards import TORCH_SUFFIX
from pixart.data.adoption.torch_shard import TorchShard


def open_shard(path: Path) -> Shard:
    """Open a `.pt` or ArrayRecord file. Raises ValueError if it is damaged or has another form."""
    return TorchShard(path) if path.suffix == TORCH_SUFFIX else ArrayRecordShard(path)
